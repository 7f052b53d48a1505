//! Holds the tree against the schema: finds every error, and turns what is right into JSON.
//!
//! Always holds: positions are recorded for every value, also for wrong ones; when no finding was
//! made the JSON deserialises as a manifest.

use crate::scalars;
use crate::schema::{Kind, MANIFEST, Struct};
use crate::source::{Finding, Span};
use crate::suggest;
use crate::tree::{Node, Value as Tree};
use crate::variables::substitute;
use quorate_types::VmName;
use serde_json::{Map, Value};
use std::collections::BTreeMap;

/// Where a path of the manifest stands in the file.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Place {
    pub(crate) key: Option<Span>,
    pub(crate) value: Option<Span>,
}

/// Path -> place.
pub(crate) type Places = BTreeMap<Vec<String>, Place>;

pub(crate) struct Walk<'a> {
    variables: &'a BTreeMap<String, String>,
    path: Vec<String>,
    pub(crate) places: Places,
    pub(crate) findings: Vec<Finding>,
}

impl<'a> Walk<'a> {
    pub(crate) fn new(variables: &'a BTreeMap<String, String>) -> Self {
        Self {
            variables,
            path: Vec::new(),
            places: Places::new(),
            findings: Vec::new(),
        }
    }

    /// The manifest as JSON; `None` when there are findings.
    pub(crate) fn manifest(&mut self, root: &Node) -> Option<Value> {
        let value = self.structure(root, &MANIFEST, root.span, None);
        if self.findings.is_empty() {
            value
        } else {
            None
        }
    }

    fn add(&mut self, finding: Finding) -> Option<Value> {
        self.findings.push(finding);
        None
    }

    fn child(
        &mut self,
        step: &str,
        key: Option<Span>,
        node: &Node,
        kind: &'static Kind,
    ) -> Option<Value> {
        self.path.push(step.to_owned());
        let scalar = matches!(node.value, Tree::Scalar { .. }) && !node.is_null();
        self.places.insert(
            self.path.clone(),
            Place {
                key,
                value: (scalar || key.is_none()).then_some(node.span),
            },
        );
        let value = self.value(node, kind, key.unwrap_or(node.span));
        self.path.pop();
        value
    }

    /// `at` is where a message about the whole value points: its key, if it has one.
    fn value(&mut self, node: &Node, kind: &'static Kind, at: Span) -> Option<Value> {
        match kind {
            Kind::Struct(shape) => self.structure(node, shape, at, None),
            Kind::List(inner) => self.list(node, inner, at),
            Kind::Names(what) => self.names(node, what, at),
            Kind::Map(what, inner) => self.map(node, what, inner, at),
            Kind::MapOrNames(what, inner) => match &node.value {
                Tree::List(items) => self.default_map(items, what),
                _ => self.map(node, what, inner, at),
            },
            Kind::TextMap => self.text_map(node, at),
            Kind::Either(words, keys) => self.either(node, words, keys, at),
            Kind::OneOf(shape, keys) => self.one_of(node, shape, keys, at),
            Kind::Tagged(tag, variants) => self.tagged(node, tag, variants, at),
            _ => self.scalar(node, kind, at),
        }
    }

    fn scalar(&mut self, node: &Node, kind: &'static Kind, at: Span) -> Option<Value> {
        let text = self.text(node, scalars::expected(kind), at)?;
        match scalars::convert(&text, kind) {
            Ok(value) => Some(value),
            Err(wrong) => self.add(Finding::new(node.span, wrong.message).maybe_hint(wrong.hint)),
        }
    }

    /// The text of a scalar with its variables replaced.
    fn text(&mut self, node: &Node, expected: &str, at: Span) -> Option<String> {
        match &node.value {
            Tree::Scalar { text, .. } if !node.is_null() => {
                match substitute(text, self.variables) {
                    Ok(text) => Some(text),
                    Err(bad) => {
                        self.add(Finding::new(node.span, bad.message).hint(bad.hint));
                        None
                    }
                }
            }
            _ => {
                let field = self.field();
                let message = format!("{field} must be {expected}, not {}", node.describe());
                self.add(Finding::new(at, message));
                None
            }
        }
    }

    /// The name of the field that is looked at, for messages.
    fn field(&self) -> String {
        match self.path.last() {
            None => "a manifest".to_owned(),
            Some(step) if step.chars().all(|c| c.is_ascii_digit()) => {
                let list = self.path.iter().rev().nth(1).map_or("", String::as_str);
                format!("an entry of `{list}`")
            }
            Some(step) => format!("`{step}`"),
        }
    }

    fn list(&mut self, node: &Node, inner: &'static Kind, at: Span) -> Option<Value> {
        if node.is_null() {
            return Some(Value::Array(Vec::new()));
        }
        let Tree::List(items) = &node.value else {
            let message = format!("{} must be a list, not {}", self.field(), node.describe());
            return self.add(Finding::new(at, message).hint("start each entry with `- `"));
        };
        let values: Vec<Option<Value>> = items
            .iter()
            .enumerate()
            .map(|(index, item)| self.child(&index.to_string(), None, item, inner))
            .collect();
        values
            .into_iter()
            .collect::<Option<Vec<_>>>()
            .map(Value::Array)
    }

    fn names(&mut self, node: &Node, what: &str, at: Span) -> Option<Value> {
        if node.is_null() {
            return Some(Value::Array(Vec::new()));
        }
        let Tree::List(items) = &node.value else {
            let message = format!(
                "{} must be a list of {what} names, not {}",
                self.field(),
                node.describe()
            );
            return self.add(Finding::new(at, message).hint("write `[one, two]`"));
        };
        let names = self.distinct(items, what);
        Some(Value::Array(names.into_iter().map(Value::String).collect()))
    }

    /// Valid names in the list, each once, with their places under the name itself.
    fn distinct(&mut self, items: &[Node], what: &str) -> Vec<String> {
        let mut seen: BTreeMap<String, usize> = BTreeMap::new();
        let mut names = Vec::new();
        for item in items {
            let Some(text) = self.text(item, "a name", item.span) else {
                continue;
            };
            if !self.check_name(&text, item.span) {
                continue;
            }
            if let Some(first) = seen.insert(text.clone(), item.span.line) {
                let message = format!("the {what} `{text}` is listed twice");
                self.add(
                    Finding::new(item.span, message).hint(format!("it is already at line {first}")),
                );
                continue;
            }
            self.path.push(text.clone());
            let place = Place {
                key: None,
                value: Some(item.span),
            };
            self.places.insert(self.path.clone(), place);
            self.path.pop();
            names.push(text);
        }
        names
    }

    fn default_map(&mut self, items: &[Node], what: &str) -> Option<Value> {
        let names = self.distinct(items, what);
        let empty = || Value::Object(Map::new());
        Some(Value::Object(
            names.into_iter().map(|n| (n, empty())).collect(),
        ))
    }

    fn check_name(&mut self, text: &str, span: Span) -> bool {
        match VmName::new(text) {
            Ok(_) => true,
            Err(error) => {
                let hint = scalars::name_hint(text);
                self.add(Finding::new(span, error.to_string()).maybe_hint(hint));
                false
            }
        }
    }

    fn map(&mut self, node: &Node, what: &str, inner: &'static Kind, at: Span) -> Option<Value> {
        if node.is_null() {
            return Some(Value::Object(Map::new()));
        }
        let Tree::Map(entries) = &node.value else {
            let message = format!(
                "{} must be a map from {what} names, not {}",
                self.field(),
                node.describe()
            );
            return self.add(Finding::new(at, message).hint(format!(
                "write each {what} as `name:` with its fields below, indented"
            )));
        };
        let mut out = Map::new();
        for (key, child) in entries {
            self.check_name(&key.text, key.span);
            if let Some(value) = self.child(&key.text, Some(key.span), child, inner) {
                out.insert(key.text.clone(), value);
            }
        }
        Some(Value::Object(out))
    }

    fn text_map(&mut self, node: &Node, at: Span) -> Option<Value> {
        if node.is_null() {
            return Some(Value::Object(Map::new()));
        }
        let Tree::Map(entries) = &node.value else {
            let message = format!("{} must be a map, not {}", self.field(), node.describe());
            return self.add(Finding::new(at, message));
        };
        let mut out = Map::new();
        for (key, child) in entries {
            if let Some(value) = self.child(&key.text, Some(key.span), child, &Kind::Line) {
                out.insert(key.text.clone(), value);
            }
        }
        Some(Value::Object(out))
    }

    fn either(
        &mut self,
        node: &Node,
        words: &'static [&'static str],
        keys: &'static [(&'static str, &'static Kind)],
        at: Span,
    ) -> Option<Value> {
        let choices = || words.iter().copied().chain(keys.iter().map(|(k, _)| *k));
        let list: Vec<String> = choices().map(|c| format!("`{c}`")).collect();
        match &node.value {
            Tree::Map(entries) => {
                if entries.len() != 1 {
                    let message =
                        format!("{} takes exactly one of {}", self.field(), list.join(", "));
                    return self.add(Finding::new(
                        entries.get(1).map_or(at, |(k, _)| k.span),
                        message,
                    ));
                }
                let (key, child) = &entries[0];
                let found = keys.iter().find(|(name, _)| *name == key.text);
                let Some((name, kind)) = found else {
                    let message = format!("unknown field `{}` in {}", key.text, self.field());
                    let hint = suggest::hint(&key.text, "known", choices());
                    return self.add(Finding::new(key.span, message).maybe_hint(hint));
                };
                let value = self.child(name, Some(key.span), child, kind)?;
                Some(Value::Object(Map::from_iter([((*name).to_owned(), value)])))
            }
            _ => {
                let text = self.text(node, &format!("one of {}", list.join(", ")), at)?;
                if words.contains(&text.as_str()) {
                    return Some(Value::String(text));
                }
                let message = format!("{} cannot be `{text}`", self.field());
                let finding = Finding::new(node.span, message);
                if keys.iter().any(|(name, _)| *name == text) {
                    return self.add(finding.hint(format!(
                        "`{text}` needs fields: write `{text}:` and put them below, indented"
                    )));
                }
                self.add(finding.maybe_hint(suggest::hint(&text, "known", choices())))
            }
        }
    }

    fn one_of(
        &mut self,
        node: &Node,
        shape: &'static Struct,
        keys: &'static [&'static str],
        at: Span,
    ) -> Option<Value> {
        if let Tree::Map(entries) = &node.value {
            let is_known = |text: &str| shape.fields.iter().any(|field| field.name == text);
            let unknown = entries.iter().any(|(key, _)| !is_known(&key.text));
            let mut given = entries
                .iter()
                .filter(|(key, _)| keys.contains(&key.text.as_str()));
            let list: Vec<String> = keys.iter().map(|key| format!("`{key}`")).collect();
            let message = format!("{} takes exactly one of {}", self.field(), list.join(", "));
            let (first, second) = (given.next(), given.next());
            if let Some((key, _)) = second {
                return self.add(Finding::new(key.span, message));
            }
            // A misspelt field is reported as such.
            if first.is_none() && !unknown {
                return self.add(Finding::new(at, message));
            }
        }
        self.structure(node, shape, at, None)
    }

    fn tagged(
        &mut self,
        node: &Node,
        tag: &'static str,
        variants: &'static [(&'static str, &'static Struct)],
        at: Span,
    ) -> Option<Value> {
        let names = || variants.iter().map(|(name, _)| *name);
        let Tree::Map(entries) = &node.value else {
            let message = format!(
                "{} must be a map with fields, not {}",
                self.field(),
                node.describe()
            );
            return self.add(Finding::new(at, message).hint(format!("it needs at least `{tag}:`")));
        };
        let Some((_, chosen)) = entries.iter().find(|(k, _)| k.text == tag) else {
            let message = format!("{} lacks `{tag}`", self.field());
            return self.add(Finding::new(at, message).maybe_hint(suggest::hint(
                "",
                &format!("`{tag}` is one of"),
                names(),
            )));
        };
        let text = self.text(chosen, "a word", chosen.span)?;
        let Some((_, shape)) = variants.iter().find(|(name, _)| *name == text) else {
            let hint = suggest::hint(&text, "known", names());
            return self.add(
                Finding::new(chosen.span, format!("unknown {tag} `{text}`")).maybe_hint(hint),
            );
        };
        self.structure(node, shape, at, Some((tag, text)))
    }

    fn structure(
        &mut self,
        node: &Node,
        shape: &'static Struct,
        at: Span,
        tag: Option<(&'static str, String)>,
    ) -> Option<Value> {
        let empty = Vec::new();
        let entries = match &node.value {
            Tree::Map(entries) => entries,
            _ if node.is_null() => &empty,
            _ => {
                let message = format!(
                    "{} must be a map with fields, not {}",
                    self.field(),
                    node.describe()
                );
                return self.add(Finding::new(at, message));
            }
        };
        let before = self.findings.len();
        let mut meant: Vec<&str> = Vec::new();
        let mut out = Map::new();
        for (key, child) in entries {
            if tag.as_ref().is_some_and(|(name, _)| *name == key.text) {
                continue;
            }
            let Some(field) = shape.fields.iter().find(|f| f.name == key.text) else {
                meant.extend(self.unknown_field(key, shape, tag.as_ref().map(|(name, _)| *name)));
                continue;
            };
            // A field with nothing behind it takes its default, unless it must be given.
            if child.is_null() && field.required.is_none() && !is_collection(&field.kind) {
                let message = format!("`{}` has no value", field.name);
                self.add(
                    Finding::new(key.span, message)
                        .hint("give it one, or remove the line for the default"),
                );
                continue;
            }
            if let Some(value) = self.child(field.name, Some(key.span), child, &field.kind) {
                out.insert(field.name.to_owned(), value);
            }
        }
        for field in shape.fields {
            let given =
                meant.contains(&field.name) || entries.iter().any(|(k, _)| k.text == field.name);
            if let (Some(example), false) = (field.required, given) {
                let whole = match self.path.last() {
                    Some(name) if !name.chars().all(|c| c.is_ascii_digit()) => format!("`{name}`"),
                    _ => shape.what.to_owned(),
                };
                self.add(
                    Finding::new(at, format!("{whole} lacks `{}`", field.name))
                        .hint(format!("add `{example}`")),
                );
            }
        }
        if let Some((name, text)) = tag {
            out.insert(name.to_owned(), Value::String(text));
        }
        (self.findings.len() == before).then_some(Value::Object(out))
    }

    /// Reports the field, and says which one was probably meant.
    fn unknown_field(
        &mut self,
        key: &crate::tree::Key,
        shape: &'static Struct,
        tag: Option<&'static str>,
    ) -> Option<&'static str> {
        let known = || shape.fields.iter().map(|f| f.name).chain(tag);
        let familiar = scalars::familiar(&key.text).filter(|field| known().any(|k| k == *field));
        let meant = familiar.or_else(|| suggest::nearest(&key.text, known()));
        let hint = match familiar {
            Some(field) => Some(format!("write `{field}`")),
            None => suggest::hint(&key.text, "known fields", known()),
        };
        let message = format!("unknown field `{}` in {}", key.text, shape.what);
        self.add(Finding::new(key.span, message).maybe_hint(hint));
        meant
    }
}

fn is_collection(kind: &Kind) -> bool {
    matches!(
        kind,
        Kind::List(_)
            | Kind::Names(_)
            | Kind::Map(..)
            | Kind::TextMap
            | Kind::MapOrNames(..)
            | Kind::Struct(_)
            | Kind::OneOf(..)
    )
}
