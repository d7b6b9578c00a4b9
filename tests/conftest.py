"""What every test runs under: Keras on JAX, eight virtual CPU devices, repeatable examples."""

import os
import tempfile

from hypothesis import settings

# Before anything imports keras or jax, which read these once.
os.environ["KERAS_BACKEND"] = "jax"
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=8")

# No test reads a verdict that another run left.
_cache = tempfile.TemporaryDirectory(prefix="autoshard-tests-")
os.environ["XDG_CACHE_HOME"] = _cache.name

# A busy machine makes no test fail, and a failure comes back on the next run.
settings.register_profile("autoshard", deadline=None, derandomize=True)
settings.load_profile("autoshard")
