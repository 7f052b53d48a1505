//! Names of things in a cluster.
//!
//! Always holds: a name is a DNS label (RFC 1123: lower-case letters, digits and `-`, 1 to 40
//! characters, starting with a letter or digit, not ending in `-`), so it can stand in file names,
//! interface aliases, URLs and tables without quoting.

use serde::{Deserialize, Deserializer, Serialize};
use std::fmt;

/// Longest accepted name, in characters.
pub const MAX_NAME: usize = 40;

/// Why a text is not a name.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum NameError {
    /// The text is empty.
    #[error("a name cannot be empty")]
    Empty,
    /// The text has more than [`MAX_NAME`] characters.
    #[error("`{0}` is longer than {MAX_NAME} characters")]
    TooLong(String),
    /// A character outside `[a-z0-9-]`, or a `-` at an end.
    #[error(
        "`{0}` is not a valid name: use lower-case letters, digits and `-`, not starting or ending with `-`"
    )]
    Character(String),
}

fn check(text: &str) -> Result<(), NameError> {
    if text.is_empty() {
        return Err(NameError::Empty);
    }
    if text.chars().count() > MAX_NAME {
        return Err(NameError::TooLong(text.to_owned()));
    }
    let good = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-';
    if !text.chars().all(good) || text.starts_with('-') || text.ends_with('-') {
        return Err(NameError::Character(text.to_owned()));
    }
    Ok(())
}

macro_rules! name_type {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
        #[serde(transparent)]
        pub struct $name(String);

        impl $name {
            /// Checks the text and makes the name.
            pub fn new(text: impl Into<String>) -> Result<Self, NameError> {
                let text = text.into();
                check(&text)?;
                Ok(Self(text))
            }

            /// The name as text.
            pub fn as_str(&self) -> &str {
                &self.0
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.pad(&self.0)
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                fmt::Debug::fmt(&self.0, f)
            }
        }

        impl std::str::FromStr for $name {
            type Err = NameError;
            fn from_str(text: &str) -> Result<Self, NameError> {
                Self::new(text)
            }
        }

        impl AsRef<str> for $name {
            fn as_ref(&self) -> &str {
                &self.0
            }
        }

        impl<'de> Deserialize<'de> for $name {
            fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
                let text = String::deserialize(deserializer)?;
                Self::new(text).map_err(serde::de::Error::custom)
            }
        }
    };
}

name_type!(
    /// Name of a host, unique in its cluster.
    HostName
);
name_type!(
    /// Name of a virtual machine, unique in its cluster.
    VmName
);
name_type!(
    /// Name of a network that guests are plugged into.
    NetworkName
);
name_type!(
    /// Name of a storage pool.
    PoolName
);
name_type!(
    /// Name of a placement rule.
    RuleName
);
name_type!(
    /// Name of a host's label, or its value.
    LabelName
);
name_type!(
    /// Name of a countable resource of hosts.
    ResourceName
);
name_type!(
    /// Name of a secret that the cluster keeps.
    SecretName
);
name_type!(
    /// Name of a service.
    ServiceName
);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn accepts_dns_labels_only() {
        for good in [
            "a",
            "db",
            "web-1",
            "0x",
            "a23456789012345678901234567890123456789b",
        ] {
            assert!(VmName::new(good).is_ok(), "{good}");
        }
        for bad in ["", "-a", "a-", "A", "a_b", "a.b", "ü", "a b", "a/b"] {
            assert!(VmName::new(bad).is_err(), "{bad}");
        }
        assert!(matches!(
            VmName::new("x".repeat(41)),
            Err(NameError::TooLong(_))
        ));
    }

    #[test]
    fn deserialising_checks_too() {
        assert!(serde_json::from_str::<HostName>("\"h1\"").is_ok());
        assert!(serde_json::from_str::<HostName>("\"../h1\"").is_err());
    }
}
