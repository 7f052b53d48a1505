//! Passwords that the cluster keeps: of targets, of arrays.
//!
//! Always holds: a secret shows itself only where the code says [`Secret::expose`]; what is logged or
//! printed has `***` instead. It is replicated like everything else, so every host can open the storage.

use serde::{Deserialize, Serialize};
use std::fmt;

/// Longest secret, in bytes.
pub const MAX_SECRET: usize = 256;

/// A password.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Secret(String);

impl Secret {
    /// Takes a text as it is.
    ///
    /// # Errors
    /// A sentence when it is empty, too long, or has a control character (a forgotten line break, for one).
    pub fn new(text: impl Into<String>) -> Result<Self, String> {
        let text = text.into();
        if text.is_empty() {
            return Err("a secret cannot be empty".to_owned());
        }
        if text.len() > MAX_SECRET {
            return Err(format!("a secret has at most {MAX_SECRET} bytes"));
        }
        if text.chars().any(char::is_control) {
            return Err("a secret cannot contain control characters".to_owned());
        }
        Ok(Self(text))
    }

    /// The secret itself. Not for logs, arguments or answers.
    pub fn expose(&self) -> &str {
        &self.0
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("***")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_is_not_printed_by_accident() {
        let secret = Secret::new("open sesame").unwrap();
        assert_eq!(format!("{secret:?}"), "***");
        assert_eq!(secret.expose(), "open sesame");
    }

    #[test]
    fn what_cannot_be_a_secret_is_refused() {
        for bad in [String::new(), "a\n".to_owned(), "x".repeat(MAX_SECRET + 1)] {
            assert!(Secret::new(bad.clone()).is_err(), "{bad:?}");
        }
    }
}
