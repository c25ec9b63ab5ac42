// Attention of sequences with one query over a cache of the activations' type.
#include "attention_decode.cuh"

ATTENTION_DECODE_EACH_DIM(bf16, bf16)
ATTENTION_DECODE_EACH_DIM(f16, f16)
