// Attention of sequences with several queries over a cache of the activations' type.
#include "attention_prefill.cuh"

ATTENTION_PREFILL_EACH_DIM(bf16, bf16)
ATTENTION_PREFILL_EACH_DIM(f16, f16)
