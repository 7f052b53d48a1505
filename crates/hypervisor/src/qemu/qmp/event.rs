//! From QMP's events to [`GuestEvent`]s, leniently: a field that is missing or of another type has a
//! default, an event that is unknown is passed on as it came.

use serde_json::Value;

use super::client::QmpEvent;
use crate::guest::GuestEvent;
use crate::migration::MigrationStatus;

/// Reads an event. `disk_of` translates a block node's name to a disk's id.
#[must_use]
pub fn parse_event(event: QmpEvent, disk_of: impl Fn(&str) -> Option<String>) -> GuestEvent {
    let QmpEvent { name, data, at_us } = event;
    let text = |field: &str| {
        data.get(field)
            .and_then(Value::as_str)
            .unwrap_or_default()
            .to_owned()
    };
    let flag = |field: &str| data.get(field).and_then(Value::as_bool).unwrap_or_default();
    match name.as_str() {
        "STOP" => GuestEvent::Stop { at_us },
        "RESUME" => GuestEvent::Resume,
        "POWERDOWN" => GuestEvent::Powerdown,
        "SHUTDOWN" => GuestEvent::Shutdown {
            by_guest: flag("guest"),
            reason: text("reason"),
        },
        "RESET" => GuestEvent::Reset {
            by_guest: flag("guest"),
            reason: text("reason"),
        },
        "MIGRATION" => GuestEvent::Migration(MigrationStatus::parse(&text("status"))),
        "MIGRATION_PASS" => {
            let pass = data.get("pass").and_then(Value::as_u64).unwrap_or_default();
            GuestEvent::MigrationPass(pass)
        }
        "GUEST_PANICKED" => GuestEvent::Panicked {
            action: text("action"),
        },
        "BLOCK_IO_ERROR" => {
            let node = text("node-name");
            GuestEvent::BlockIoError {
                disk: disk_of(&node).unwrap_or(node),
                operation: text("operation"),
                stopped: text("action") == "stop",
                no_space: flag("nospace"),
                reason: text("reason"),
            }
        }
        _ => GuestEvent::Other { name, data },
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn parse(name: &str, data: Value) -> GuestEvent {
        let disk_of = |node: &str| (node == "disk0").then(|| "root".to_owned());
        parse_event(
            QmpEvent {
                name: name.into(),
                data,
                at_us: 5,
            },
            disk_of,
        )
    }

    #[test]
    fn known_events_are_typed() {
        assert_eq!(parse("STOP", Value::Null), GuestEvent::Stop { at_us: 5 });
        assert_eq!(
            parse(
                "SHUTDOWN",
                json!({ "guest": true, "reason": "guest-shutdown" })
            ),
            GuestEvent::Shutdown {
                by_guest: true,
                reason: "guest-shutdown".into()
            }
        );
        assert_eq!(
            parse("MIGRATION", json!({ "status": "pre-switchover" })),
            GuestEvent::Migration(MigrationStatus::PreSwitchover)
        );
        assert_eq!(
            parse(
                "BLOCK_IO_ERROR",
                json!({ "device": "", "node-name": "disk0", "operation": "write", "action": "stop",
                        "nospace": true, "reason": "No space left on device" })
            ),
            GuestEvent::BlockIoError {
                disk: "root".into(),
                operation: "write".into(),
                stopped: true,
                no_space: true,
                reason: "No space left on device".into()
            }
        );
    }

    #[test]
    fn unknown_values_and_missing_fields_survive() {
        assert_eq!(
            parse("MIGRATION", json!({ "status": "teleporting" })),
            GuestEvent::Migration(MigrationStatus::Other("teleporting".into()))
        );
        assert_eq!(
            parse("SHUTDOWN", json!({ "guest": "yes" })),
            GuestEvent::Shutdown {
                by_guest: false,
                reason: String::new()
            }
        );
        assert_eq!(
            parse("NEW", json!({ "a": 1 })),
            GuestEvent::Other {
                name: "NEW".into(),
                data: json!({ "a": 1 })
            }
        );
    }
}
