// Attention of sequences with several queries over a cache of eight bits.
#include "attention_prefill.cuh"

ATTENTION_PREFILL_EACH_DIM(bf16, e4m3)
ATTENTION_PREFILL_EACH_DIM(f16, e4m3)
ATTENTION_PREFILL_EACH_DIM(bf16, e5m2)
ATTENTION_PREFILL_EACH_DIM(f16, e5m2)
