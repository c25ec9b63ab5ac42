//! Quartet: one shard, the process that owns one device and one rank of a model.
