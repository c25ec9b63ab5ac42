//! Quartet: the real programs, driven through one harness.
