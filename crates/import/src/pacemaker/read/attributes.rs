//! Attribute sets with their rules, and the hosts that have them.

use super::super::model::{AttributeSet, Condition, Node as HostNode, Rule};
use super::super::values;
use super::{Reader, all_attributes, child, children, named, owned};
use roxmltree::Node;
use std::collections::BTreeSet;

impl<'a> Reader<'a> {
    /// The sets of a kind below an element.
    pub(super) fn sets(&mut self, node: Node<'a, 'a>, name: &'static str) -> Vec<AttributeSet> {
        let mut sets = Vec::new();
        for set in named(node, name) {
            if let Some(set) = self.resolve(set) {
                sets.push(self.set(set));
            }
        }
        sets
    }

    fn set(&mut self, set: Node<'a, 'a>) -> AttributeSet {
        let mut read = AttributeSet {
            id: owned(set, "id").unwrap_or_default(),
            score: self.score(set, "score").unwrap_or(0),
            rule: None,
            pairs: Vec::new(),
        };
        // Very old releases had one more level.
        let pairs = child(set, "attributes").unwrap_or(set);
        for pair in named(pairs, "nvpair") {
            let Some(target) = self.resolve(pair) else {
                continue;
            };
            let name = pair.attribute("name").or(target.attribute("name"));
            if let (Some(name), Some(value)) = (name, target.attribute("value")) {
                read.pairs.push((name.to_owned(), value.to_owned()));
            }
        }
        read.rule = child(set, "rule").and_then(|rule| self.rule(rule));
        read
    }

    pub(super) fn rule(&mut self, node: Node<'a, 'a>) -> Option<Rule> {
        let node = self.resolve(node)?;
        let mut rule = Rule {
            all: node
                .attribute("boolean-op")
                .is_none_or(|op| !op.eq_ignore_ascii_case("or")),
            conditions: Vec::new(),
            score: self.score(node, "score"),
            score_attribute: owned(node, "score-attribute"),
            role: owned(node, "role"),
        };
        for condition in children(node) {
            let read = self.condition(condition);
            rule.conditions.extend(read);
        }
        Some(rule)
    }

    fn condition(&mut self, node: Node<'a, 'a>) -> Option<Condition> {
        let text = |name: &str| owned(node, name);
        Some(match node.tag_name().name() {
            "rule" => match self.rule(node) {
                Some(rule) => Condition::Rule(rule),
                None => Condition::Unknown,
            },
            "expression" => Condition::Attribute {
                attribute: text("attribute")?,
                operation: text("operation").unwrap_or_default(),
                value: text("value"),
                kind: text("type"),
                source: text("value-source"),
            },
            "date_expression" => self.date(node),
            "rsc_expression" => Condition::Resource {
                class: text("class"),
                provider: text("provider"),
                kind: text("type"),
            },
            "op_expression" => Condition::Operation {
                name: text("name").unwrap_or_default(),
                interval_ms: text("interval").and_then(|text| values::duration_ms(&text)),
            },
            other => {
                self.warn(
                    node,
                    format!("a condition <{other}> is not known: it does not hold"),
                );
                Condition::Unknown
            }
        })
    }

    fn date(&mut self, node: Node<'a, 'a>) -> Condition {
        let mut time = |name: &str| {
            let text = node.attribute(name)?;
            let time = values::time(text);
            if time.is_none() {
                self.warn(
                    node,
                    format!("{name}=\"{text}\" is no time: the condition does not hold"),
                );
            }
            Some(time)
        };
        let (start, end) = (time("start"), time("end"));
        if matches!(start, Some(None)) || matches!(end, Some(None)) {
            return Condition::Unknown;
        }
        Condition::Date {
            operation: owned(node, "operation").unwrap_or_else(|| "in_range".to_owned()),
            start: start.flatten(),
            end: end.flatten(),
            duration: child(node, "duration").map(all_attributes),
            parts: child(node, "date_spec").map(all_attributes),
        }
    }

    pub(super) fn nodes(&mut self, section: Node<'a, 'a>) {
        let mut names = BTreeSet::new();
        for node in named(section, "node") {
            let Some(id) = self.id(node) else { continue };
            if matches!(node.attribute("type"), Some("remote")) {
                let name = node.attribute("uname").unwrap_or(&id);
                let message = format!("remote node \"{name}\"");
                self.unsupported(node, message, "hosts run the Quorate daemon themselves");
                continue;
            }
            let read = HostNode {
                place: self.place(node),
                name: owned(node, "uname").unwrap_or_else(|| id.clone()),
                id,
                score: self.score(node, "score").unwrap_or(0),
                attributes: self.sets(node, "instance_attributes"),
                utilization: self.sets(node, "utilization"),
            };
            if !names.insert(read.name.clone()) {
                let message = format!("node \"{}\" is there twice", read.name);
                self.error(node, message, "remove one of the two <node> elements");
                continue;
            }
            self.cib.nodes.push(read);
        }
    }
}
