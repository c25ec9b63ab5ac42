//! Tests of snapshot.rs.
