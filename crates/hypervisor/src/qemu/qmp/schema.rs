//! What a QEMU can do, by its own word (`query-qmp-schema`): features, never version numbers.

use std::collections::{BTreeMap, BTreeSet};

use serde_json::Value;

/// Commands with their arguments, and events.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Schema {
    commands: BTreeMap<String, BTreeSet<String>>,
    events: BTreeSet<String>,
}

impl Schema {
    /// Reads the reply of `query-qmp-schema`; what it does not understand it leaves out.
    #[must_use]
    pub fn parse(reply: &Value) -> Self {
        let entities = reply.as_array().map(Vec::as_slice).unwrap_or_default();
        let text = |entity: &Value, field: &str| {
            entity
                .get(field)
                .and_then(Value::as_str)
                .unwrap_or_default()
                .to_owned()
        };
        let mut members: BTreeMap<String, BTreeSet<String>> = BTreeMap::new();
        for entity in entities
            .iter()
            .filter(|entity| text(entity, "meta-type") == "object")
        {
            let list = entity.get("members").and_then(Value::as_array);
            let names = list
                .into_iter()
                .flatten()
                .map(|member| text(member, "name"))
                .collect();
            members.insert(text(entity, "name"), names);
        }
        let mut schema = Self::default();
        for entity in entities {
            let name = text(entity, "name");
            match text(entity, "meta-type").as_str() {
                "command" => {
                    let arguments = members.get(&text(entity, "arg-type"));
                    schema
                        .commands
                        .insert(name, arguments.cloned().unwrap_or_default());
                }
                "event" => {
                    schema.events.insert(name);
                }
                _ => {}
            }
        }
        schema
    }

    /// Whether the command exists.
    #[must_use]
    pub fn has_command(&self, command: &str) -> bool {
        self.commands.contains_key(command)
    }

    /// Whether the command exists and takes this argument.
    #[must_use]
    pub fn has_argument(&self, command: &str, argument: &str) -> bool {
        self.commands
            .get(command)
            .is_some_and(|arguments| arguments.contains(argument))
    }

    /// Whether the event exists.
    #[must_use]
    pub fn has_event(&self, event: &str) -> bool {
        self.events.contains(event)
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn reads_commands_arguments_and_events() {
        let schema = Schema::parse(&json!([
            { "name": "migrate", "meta-type": "command", "arg-type": "12", "ret-type": "0" },
            { "name": "12", "meta-type": "object", "members": [{ "name": "uri", "type": "str" }] },
            { "name": "STOP", "meta-type": "event", "arg-type": "0" },
            { "name": "odd", "meta-type": "hologram" },
            42
        ]));
        assert!(schema.has_command("migrate") && !schema.has_command("12"));
        assert!(schema.has_argument("migrate", "uri") && !schema.has_argument("migrate", "url"));
        assert!(schema.has_event("STOP") && !schema.has_event("migrate"));
    }
}
