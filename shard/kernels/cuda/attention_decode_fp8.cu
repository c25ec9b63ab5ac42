// Attention of sequences with one query over a cache of eight bits.
#include "attention_decode.cuh"

ATTENTION_DECODE_EACH_DIM(bf16, e4m3)
ATTENTION_DECODE_EACH_DIM(f16, e4m3)
ATTENTION_DECODE_EACH_DIM(bf16, e5m2)
ATTENTION_DECODE_EACH_DIM(f16, e5m2)
