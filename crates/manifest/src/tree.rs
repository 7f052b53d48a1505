//! YAML (and so JSON) as a tree with positions.
//!
//! Owns: reading the text with the parser that `serde-saphyr` is built on. It is used directly,
//! because serde stops at the first error and drops positions on the way. Always holds: the tree
//! has at most [`MAX_NODES`] nodes and [`MAX_DEPTH`] levels, aliases expanded, so neither a deep
//! nor a self-multiplying document costs more than that; no map in it has a key twice.

use crate::source::{Finding, Span};
use granit_parser::{Event, Parser, ScalarStyle};
use std::collections::BTreeMap;

/// Most nodes of a manifest, with aliases expanded.
pub(crate) const MAX_NODES: usize = 100_000;
/// Most levels of nesting.
pub(crate) const MAX_DEPTH: usize = 32;

#[derive(Debug, Clone)]
pub(crate) struct Node {
    pub(crate) span: Span,
    pub(crate) value: Value,
}

#[derive(Debug, Clone)]
pub(crate) enum Value {
    /// Text of a scalar, and whether it stood in quotes.
    Scalar {
        text: String,
        quoted: bool,
    },
    List(Vec<Node>),
    Map(Vec<(Key, Node)>),
}

#[derive(Debug, Clone)]
pub(crate) struct Key {
    pub(crate) span: Span,
    pub(crate) text: String,
}

impl Node {
    /// `key:` with nothing behind it, or an explicit null.
    pub(crate) fn is_null(&self) -> bool {
        match &self.value {
            Value::Scalar { text, quoted } => {
                !quoted && matches!(text.as_str(), "" | "~" | "null" | "Null" | "NULL")
            }
            _ => false,
        }
    }

    pub(crate) fn describe(&self) -> &'static str {
        match &self.value {
            Value::Scalar { .. } if self.is_null() => "nothing",
            Value::Scalar { .. } => "a single value",
            Value::List(_) => "a list",
            Value::Map(_) => "a map",
        }
    }

    fn count(&self) -> usize {
        match &self.value {
            Value::Scalar { .. } => 1,
            Value::List(items) => 1 + items.iter().map(Self::count).sum::<usize>(),
            Value::Map(entries) => 1 + entries.iter().map(|(_, n)| 1 + n.count()).sum::<usize>(),
        }
    }
}

/// A collection that is still being read.
struct Open {
    anchor: usize,
    span: Span,
    value: Value,
    key: Option<Key>,
    /// Keys seen, with the line of each.
    seen: BTreeMap<String, usize>,
}

struct Builder {
    stack: Vec<Open>,
    anchors: BTreeMap<usize, Node>,
    nodes: usize,
    root: Option<Node>,
    documents: usize,
    findings: Vec<Finding>,
}

/// Reads the one document of the text. Duplicate keys are collected; anything else ends the reading.
pub(crate) fn read(text: &str) -> Result<Node, Vec<Finding>> {
    let options = granit_parser::options! { emit_comments: false };
    let mut builder = Builder {
        stack: Vec::new(),
        anchors: BTreeMap::new(),
        nodes: 0,
        root: None,
        documents: 0,
        findings: Vec::new(),
    };
    for next in Parser::new_from_str_with_options(text, options) {
        let result = match next {
            Ok((event, span)) => builder.event(event, convert(&span)),
            Err(error) => Err(syntax(text, &error)),
        };
        if let Err(finding) = result {
            builder.findings.push(finding);
            return Err(builder.findings);
        }
    }
    if !builder.findings.is_empty() {
        return Err(builder.findings);
    }
    match builder.root {
        Some(root) if !root.is_null() => Ok(root),
        _ => Err(vec![Finding::new(start(), "the manifest is empty").hint(
            "it needs at least one of `cluster:`, `networks:`, `pools:`, `vms:`, `rules:`",
        )]),
    }
}

pub(crate) fn start() -> Span {
    Span {
        line: 1,
        column: 1,
        width: 1,
    }
}

fn convert(span: &granit_parser::Span) -> Span {
    let one_line = span.start.line() == span.end.line();
    let width = if one_line {
        span.end.col().saturating_sub(span.start.col())
    } else {
        usize::MAX
    };
    Span {
        line: span.start.line().max(1),
        column: span.start.col() + 1,
        width: width.max(1),
    }
}

fn syntax(text: &str, error: &granit_parser::ScanError) -> Finding {
    let mark = error.marker();
    let span = Span {
        line: mark.line().max(1),
        column: mark.col() + 1,
        width: 1,
    };
    let line = text.lines().nth(span.line - 1).unwrap_or_default();
    let hint = if line.trim_start_matches(' ').starts_with('\t') {
        "indent with spaces, not tabs"
    } else {
        "check the indentation and quotes here and on the line before"
    };
    Finding::new(span, format!("this is not valid YAML: {}", error.info())).hint(hint)
}

impl Builder {
    fn event(&mut self, event: Event<'_>, span: Span) -> Result<(), Finding> {
        if let Some(tag) = event.tag() {
            return Err(Finding::new(
                span,
                format!("the tag `{}` is not supported", tag.original()),
            )
            .hint("remove it; types are known from the field"));
        }
        match event {
            Event::DocumentStart(..) => {
                self.documents += 1;
                if self.documents > 1 {
                    return Err(Finding::new(span, "a second document starts here")
                        .hint("a manifest is one document: put all objects under the same `vms:`, `pools:`, ..."));
                }
                Ok(())
            }
            Event::Scalar(text, style, anchor, _) => {
                let quoted = style != ScalarStyle::Plain;
                let value = Value::Scalar {
                    text: text.into_owned(),
                    quoted,
                };
                self.add(Node { span, value }, anchor)
            }
            Event::SequenceStart(_, anchor, _) => self.open(Value::List(Vec::new()), anchor, span),
            Event::MappingStart(_, anchor, _) => self.open(Value::Map(Vec::new()), anchor, span),
            Event::SequenceEnd | Event::MappingEnd => self.close(span),
            Event::Alias(id) => self.alias(id, span),
            _ => Ok(()),
        }
    }

    fn open(&mut self, value: Value, anchor: usize, span: Span) -> Result<(), Finding> {
        if self.awaits_key() {
            return Err(Finding::new(span, "a key must be a plain word")
                .hint("quote it if it contains `{`, `[` or `:`"));
        }
        if self.stack.len() >= MAX_DEPTH {
            return Err(Finding::new(
                span,
                format!("nested deeper than {MAX_DEPTH} levels"),
            ));
        }
        self.stack.push(Open {
            anchor,
            span,
            value,
            key: None,
            seen: BTreeMap::new(),
        });
        Ok(())
    }

    fn close(&mut self, span: Span) -> Result<(), Finding> {
        let Some(open) = self.stack.pop() else {
            return Err(Finding::new(span, "a collection ends that never began"));
        };
        let node = Node {
            span: open.span,
            value: open.value,
        };
        self.add(node, open.anchor)
    }

    fn alias(&mut self, id: usize, span: Span) -> Result<(), Finding> {
        if self.awaits_key() {
            return Err(Finding::new(span, "an alias cannot be a key"));
        }
        let Some(target) = self.anchors.get(&id) else {
            return Err(Finding::new(span, "this alias refers to itself"));
        };
        let size = target.count();
        if self.nodes + size > MAX_NODES {
            return Err(too_many(span));
        }
        let mut node = target.clone();
        self.nodes += size;
        node.span = span;
        self.add(node, 0)
    }

    fn awaits_key(&self) -> bool {
        matches!(
            self.stack.last(),
            Some(Open {
                value: Value::Map(_),
                key: None,
                ..
            })
        )
    }

    fn add(&mut self, node: Node, anchor: usize) -> Result<(), Finding> {
        self.nodes += 1;
        if self.nodes > MAX_NODES {
            return Err(too_many(node.span));
        }
        if anchor > 0 {
            self.anchors.insert(anchor, node.clone());
        }
        let Some(open) = self.stack.last_mut() else {
            self.root = Some(node);
            return Ok(());
        };
        match &mut open.value {
            Value::List(items) => items.push(node),
            Value::Map(entries) => match open.key.take() {
                Some(key) => entries.push((key, node)),
                None => {
                    let key = as_key(node)?;
                    if let Some(first) = open.seen.insert(key.text.clone(), key.span.line) {
                        let message = format!("`{}` is given twice", key.text);
                        self.findings
                            .push(Finding::new(key.span, message).hint(format!(
                                "the first one is at line {first}; remove or rename one of them"
                            )));
                    }
                    open.key = Some(key);
                }
            },
            Value::Scalar { .. } => {}
        }
        Ok(())
    }
}

fn as_key(node: Node) -> Result<Key, Finding> {
    match node.value {
        Value::Scalar {
            text,
            quoted: false,
        } if text == "<<" => Err(
            Finding::new(node.span, "merge keys (`<<`) are not supported")
                .hint("write the fields out, or use an alias for the whole value"),
        ),
        Value::Scalar { text, .. } => Ok(Key {
            span: node.span,
            text,
        }),
        _ => Err(Finding::new(node.span, "a key must be a plain word")),
    }
}

fn too_many(span: Span) -> Finding {
    let message = format!("the manifest has more than {MAX_NODES} values with aliases expanded");
    Finding::new(span, message).hint("split it and apply the parts one by one")
}
