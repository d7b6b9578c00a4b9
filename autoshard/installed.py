"""What is installed here, without importing it."""

from importlib.metadata import PackageNotFoundError, version

__all__ = ["COMPILERS", "installed_version"]

# Kind of chip -> the package that its compiler comes in.
COMPILERS = {"cpu": "jaxlib", "tpu": "libtpu", "gpu": "jax-cuda12-plugin"}


def installed_version(package: str) -> str:
    """The version of a package, "" where it is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return ""
