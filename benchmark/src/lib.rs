//! Quartet: drives warm-up, prefill and decode on running shards and reports what they do.
