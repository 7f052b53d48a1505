//! The manifest's JSON schema (draft 2020-12), for editors.

use crate::schema::{Kind, MANIFEST, Struct};
use serde_json::{Map, Value, json};

/// The schema as JSON, written from the same table that [`crate::parse`] reads by.
#[must_use]
pub fn json_schema() -> Value {
    let mut schema = structure(&MANIFEST, None);
    schema["$schema"] = "https://json-schema.org/draft/2020-12/schema".into();
    schema["title"] = "Quorate manifest".into();
    schema
}

fn structure(shape: &Struct, tag: Option<(&str, &str)>) -> Value {
    let mut properties = Map::new();
    let mut required: Vec<&str> = Vec::new();
    if let Some((name, value)) = tag {
        properties.insert(name.to_owned(), json!({ "const": value }));
        required.push(name);
    }
    for field in shape.fields {
        let mut value = kind(&field.kind);
        value["description"] = field.doc.into();
        properties.insert(field.name.to_owned(), value);
        if field.required.is_some() {
            required.push(field.name);
        }
    }
    let mut out =
        json!({ "type": "object", "properties": properties, "additionalProperties": false });
    if !required.is_empty() {
        out["required"] = json!(required);
    }
    out
}

fn name() -> Value {
    json!({ "type": "string", "pattern": "^[a-z0-9]([a-z0-9-]{0,38}[a-z0-9])?$" })
}

fn names() -> Value {
    json!({ "type": "array", "items": name(), "uniqueItems": true })
}

fn map(inner: &Kind) -> Value {
    json!({ "type": "object", "propertyNames": name(), "additionalProperties": kind(inner) })
}

fn kind(kind_of: &Kind) -> Value {
    match kind_of {
        Kind::Name => name(),
        Kind::Text => json!({ "type": "string", "minLength": 1 }),
        Kind::Line => json!({ "type": "string" }),
        Kind::Size => {
            json!({ "type": "string", "pattern": "^[0-9]+ ?([KMGT]iB|[kMGT]?B)$|\\$\\{" })
        }
        Kind::Duration => json!({ "type": "string", "pattern": "^[0-9]+ ?(ms|s|m|h|d)$|\\$\\{" }),
        Kind::Int(min, max) => json!({ "anyOf": [
            { "type": "integer", "minimum": min, "maximum": max },
            { "type": "string", "pattern": "\\$\\{" },
        ] }),
        Kind::Bool => json!({ "anyOf": [
            { "type": "boolean" },
            { "type": "string", "pattern": "\\$\\{" },
        ] }),
        Kind::Choice(words) => json!({ "anyOf": [
            { "enum": words },
            { "type": "string", "pattern": "\\$\\{" },
        ] }),
        Kind::Address | Kind::Address6 | Kind::Subnet(_) => json!({ "type": "string" }),
        Kind::Ports => json!({ "anyOf": [
            { "type": "integer", "minimum": 1, "maximum": 65_535 },
            { "type": "string", "pattern": "^[0-9]+(-[0-9]+)?(/(tcp|udp))?$|\\$\\{" },
        ] }),
        Kind::List(inner) => json!({ "type": "array", "items": kind(inner) }),
        Kind::Names(_) => names(),
        Kind::Map(_, inner) => map(inner),
        Kind::MapOrNames(_, inner) => json!({ "anyOf": [names(), map(inner)] }),
        Kind::TextMap => json!({
            "type": "object",
            "additionalProperties": { "type": ["string", "number", "boolean"] },
        }),
        Kind::Struct(shape) => structure(shape, None),
        Kind::Either(words, keys) => {
            let mut any: Vec<Value> = Vec::new();
            if !words.is_empty() {
                any.push(json!({ "enum": words }));
            }
            for (key, inner) in *keys {
                any.push(json!({
                    "type": "object",
                    "properties": { *key: kind(inner) },
                    "required": [key],
                    "additionalProperties": false,
                }));
            }
            json!({ "anyOf": any })
        }
        Kind::OneOf(shape, keys) => {
            let mut out = structure(shape, None);
            let one: Vec<Value> = keys
                .iter()
                .map(|key| json!({ "required": [key] }))
                .collect();
            out["oneOf"] = one.into();
            out
        }
        Kind::Tagged(tag, variants) => {
            let any: Vec<Value> = variants
                .iter()
                .map(|(name, shape)| structure(shape, Some((tag, name))))
                .collect();
            json!({ "anyOf": any })
        }
    }
}
