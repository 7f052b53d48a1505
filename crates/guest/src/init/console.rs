//! One line at a time to the serial console.

use std::fs::{File, OpenOptions};
use std::io::Write;
use std::sync::{Mutex, PoisonError};

static CONSOLE: Mutex<Option<File>> = Mutex::new(None);

/// Prints a line; a console that does not work loses it.
pub(crate) fn say(line: &str) {
    let mut console = CONSOLE.lock().unwrap_or_else(PoisonError::into_inner);
    if console.is_none() {
        *console = OpenOptions::new().write(true).open("/dev/console").ok();
    }
    if let Some(file) = console.as_mut() {
        let _ = file.write_all(format!("{line}\n").as_bytes());
    }
}
