//! Tests of the reader of CIBs.
