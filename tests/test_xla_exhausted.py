"""Out-of-memory messages of the compilers, in a sentence."""

from autoshard.xla.exhausted import exhausted_sentence

LISTED = """RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory \
space hbm. Used 17.00G of 15.75G hbm. Exceeded hbm capacity by 1.25G.

Total hbm usage >= 17.50G:
    reserved        512.00M
    program          17.00G

Largest program allocations in hbm:

  1. Size: 3.91G
     Operator: op_name="jit(step)/jvp(net)/logits/dot_general" source_file="a.py"
     Shape: f32[8,512,256000]{2,1,0:T(8,128)}
     Unpadded size: 3.91G
     ==========================

  2. Size: 512.00M
     Shape: bf16[8,512,65536]{2,1,0}
     ==========================
"""


def test_the_largest_buffers_are_named_in_one_line():
    assert exhausted_sentence(LISTED, "tpu:v5e:2x4") == (
        "the step does not fit tpu:v5e:2x4: a device needs 17.00 GiB and has 15.75 GiB, 1.25 GiB "
        "less; the largest buffers: 3.91 GiB f32[8,512,256000] of jvp(net)/logits/dot_general, "
        "512.0 MiB bf16[8,512,65536] of an unnamed one"
    )


def test_a_message_of_another_form_is_quoted():
    assert exhausted_sentence("RESOURCE_EXHAUSTED: too much.\nmore", "tpu:v4:2x2x1") == (
        "the step does not fit tpu:v4:2x2x1: too much."
    )
