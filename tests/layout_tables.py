"""Variable tables of small models, written out by hand, for tests of layouts and plans."""

from autoshard.mesh import Mesh
from autoshard.model.variables import ModelTable, make_table

MESH = Mesh(shape=(1, 8), axis_names=("batch", "model"))


def gemma_table(n_blocks: int = 2, lora: bool = False, dtype: str = "bfloat16") -> ModelTable:
    """Gemma 7B's variables and layer outputs, with fewer blocks."""
    rows = [("token_embedding/embeddings", (256000, 3072), dtype, not lora)]
    outputs = ["token_embedding/output"]
    for k in range(n_blocks):
        block = f"decoder_block_{k}"
        rows.append((f"{block}/pre_attention_norm/scale", (3072,), dtype, not lora))
        for name in ("query", "key", "value"):
            layer = f"{block}/attention/{name}"
            rows.append((f"{layer}/kernel", (16, 3072, 256), dtype, not lora))
            if lora and name != "key":
                rows.append((f"{layer}/lora_kernel_a", (16, 3072, 4), "float32", True))
                rows.append((f"{layer}/lora_kernel_b", (4, 256), "float32", True))
            outputs.append(f"{layer}/output")
        rows.append(
            (f"{block}/attention/attention_output/kernel", (16, 256, 3072), dtype, not lora)
        )
        rows.append((f"{block}/ffw_gating/kernel", (3072, 24576), dtype, not lora))
        rows.append((f"{block}/ffw_gating_2/kernel", (3072, 24576), dtype, not lora))
        rows.append((f"{block}/ffw_linear/kernel", (24576, 3072), dtype, not lora))
        outputs += [f"{block}/attention/attention_output/output", f"{block}/attention/output"]
        outputs += [f"{block}/{name}/output" for name in ("ffw_gating", "ffw_linear")]
        outputs.append(f"{block}/output")
    rows.append(("final_normalization/scale", (3072,), dtype, not lora))
    return make_table("gemma", rows, outputs, ["seed_generator/seed_generator_state"])


def mixtral_table(first_number: int = 0) -> ModelTable:
    """Two Mixtral blocks, as the model built after `first_number` blocks of others has them."""
    rows, outputs = [], []
    for k in range(2):
        number = first_number + k
        block = f"transformer_layer_{k}/sparse_moe_block" + (f"_{number}" if number else "")
        rows.append(
            (f"transformer_layer_{k}/self_attention/query/kernel", (64, 8, 8), "float32", True)
        )
        rows.append((f"{block}/gate_dense/kernel", (64, 8), "float32", True))
        rows.append((f"{block}/experts/gate_dense", (8, 64, 128), "float32", True))
        rows.append((f"{block}/experts/output_dense", (8, 128, 64), "float32", True))
        outputs += [f"{block}/output", f"{block}/experts/output", f"transformer_layer_{k}/output"]
    return make_table("mixtral", rows, outputs)
