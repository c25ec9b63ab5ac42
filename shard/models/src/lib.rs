//! Quartet: architectures as data, their weights, and the one executor.
