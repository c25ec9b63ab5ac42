//! Quartet: the fused operations a model needs, and the devices that run them.
