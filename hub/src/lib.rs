//! Quartet: what a model is, on disk or on the Hub.
