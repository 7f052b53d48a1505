//! Whatever the text: reading, planning and converting it come to an end and do not panic.
//!
//! `cargo +nightly fuzz run cib` (needs cargo-fuzz). The corpus also runs as an ordinary test.
#![no_main]

use libfuzzer_sys::fuzz_target;
use quorate_import::pacemaker;

fuzz_target!(|text: &str| {
    if let Ok(cib) = pacemaker::read(text, "fuzz") {
        let _ = pacemaker::plan(&cib, 1_700_000_000);
        let _ = pacemaker::convert(&cib, "fuzz", true, 1_700_000_000);
    }
});
