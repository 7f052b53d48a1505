//! From the XML document to [`Cib`]: what is written, not yet what it means.
//!
//! Strict about what must be right for a decision (ids, scores, structure), lenient about what other
//! versions may have added. References (`id-ref`, templates) are resolved here.

mod attributes;
mod constraints;
mod resources;
mod status;

use super::guard;
use super::model::{Cib, Resource};
use super::values;
use crate::{Place, Problem, Problems};
use quorate_planner::engine::Score;
use roxmltree::{Document, Node, ParsingOptions};
use std::collections::BTreeMap;

/// Most resources times nodes.
pub(super) const MAX_SCORES: usize = 25_000_000;

/// Most warnings that are kept; what more there is changes nothing for the reader.
const MAX_WARNINGS: usize = 500;

/// Reads a CIB.
///
/// # Errors
/// Says at which places the text is no CIB, or exceeds the bounds.
pub fn read(text: &str, file: &str) -> Result<Cib, Problems> {
    let problems = |problems: Vec<Problem>| Problems {
        file: file.to_owned(),
        problems,
    };
    guard::check(text).map_err(|problem| problems(vec![problem]))?;
    let options = ParsingOptions {
        nodes_limit: u32::try_from(guard::MAX_ELEMENTS).unwrap_or(u32::MAX) * 4,
        ..ParsingOptions::default()
    };
    let document = Document::parse_with_options(text, options)
        .map_err(|error| problems(vec![not_xml(text, &error)]))?;
    let mut reader = Reader::new(text, &document);
    reader.cib();
    if reader.errors.is_empty() {
        Ok(reader.cib)
    } else {
        Err(problems(reader.errors))
    }
}

fn not_xml(text: &str, error: &roxmltree::Error) -> Problem {
    let at = error.pos();
    let place = match error {
        // The reader does not say where: at the end.
        roxmltree::Error::UnclosedRootNode => guard::place(text, text.len()),
        _ => Place {
            line: at.row,
            column: at.col,
        },
    };
    let words = error.to_string();
    let words = words.split(" at ").next().unwrap_or(&words).to_owned();
    Problem::new(place, format!("not well-formed XML: {words}"))
        .hint("`cibadmin --query` writes a CIB that can be read")
}

struct Reader<'a> {
    text: &'a str,
    document: &'a Document<'a>,
    lines: Vec<usize>,
    ids: BTreeMap<&'a str, Node<'a, 'a>>,
    templates: BTreeMap<&'a str, Node<'a, 'a>>,
    cib: Cib,
    errors: Vec<Problem>,
}

impl<'a> Reader<'a> {
    fn new(text: &'a str, document: &'a Document<'a>) -> Self {
        let starts = text.match_indices('\n').map(|(at, _)| at + 1);
        let mut ids = BTreeMap::new();
        for node in document.descendants().filter(Node::is_element) {
            if let Some(id) = node.attribute("id") {
                ids.entry(id).or_insert(node);
            }
        }
        Self {
            text,
            document,
            lines: std::iter::once(0).chain(starts).collect(),
            ids,
            templates: BTreeMap::new(),
            cib: Cib::default(),
            errors: Vec::new(),
        }
    }

    fn place(&self, node: Node<'_, '_>) -> Place {
        let at = node.range().start;
        let line = self.lines.partition_point(|start| *start <= at);
        let start = self.lines[line.saturating_sub(1)];
        let before = self.text.get(start..at).unwrap_or_default();
        // Counting characters in a line of many megabytes again and again would take for ever.
        let column = match before.len() {
            length if length > 4096 => length,
            _ => before.chars().count(),
        };
        let small = |number: usize| u32::try_from(number).unwrap_or(u32::MAX);
        Place {
            line: small(line),
            column: small(column + 1),
        }
    }

    fn error(&mut self, node: Node<'_, '_>, message: impl Into<String>, hint: &str) {
        let problem = Problem::new(self.place(node), message).hint(hint);
        if self.errors.len() < MAX_WARNINGS {
            self.errors.push(problem);
        }
    }

    fn warn(&mut self, node: Node<'_, '_>, message: impl Into<String>) {
        let problem = Problem::new(self.place(node), message);
        if self.cib.warnings.len() < MAX_WARNINGS {
            self.cib.warnings.push(problem);
        }
    }

    fn unsupported(&mut self, node: Node<'_, '_>, message: impl Into<String>, hint: &str) {
        // Constraints about it name something that is there.
        for inner in node.descendants() {
            let guest = inner.attribute("name") == Some("remote-node");
            let value = inner.attribute("value").filter(|_| guest);
            let names = [inner.attribute("id"), inner.attribute("uname"), value];
            let names = names.into_iter().flatten().map(str::to_owned);
            self.cib.set_aside.extend(names);
        }
        let problem = Problem::new(self.place(node), message).hint(hint);
        if self.cib.unsupported.len() < MAX_WARNINGS {
            self.cib.unsupported.push(problem);
        }
    }

    fn cib(&mut self) {
        let root = self.document.root_element();
        if !root.has_tag_name("cib") {
            let message = format!("<{}> where <cib> is expected", root.tag_name().name());
            self.error(root, message, "give the output of `cibadmin --query`");
            return;
        }
        let truth = |name: &str| root.attribute(name).and_then(values::truth);
        self.cib.has_quorum = truth("have-quorum").unwrap_or(false);
        self.cib.may_panic = truth("no-quorum-panic").unwrap_or(false);
        self.cib.coordinator = owned(root, "dc-uuid");
        self.cib.execution_date = root
            .attribute("execution-date")
            .and_then(|text| text.trim().parse().ok());
        let Some(configuration) = child(root, "configuration") else {
            let hint = "a CIB has the sections <configuration> and <status>";
            self.error(root, "no <configuration> in <cib>", hint);
            return;
        };
        self.configuration(configuration);
        self.size(configuration);
        if let Some(status) = child(root, "status") {
            self.status(status);
        }
    }

    /// Every resource has a score for every host: that has a bound, too.
    fn size(&mut self, configuration: Node<'a, 'a>) {
        let members = |resource: &Resource| match resource {
            Resource::Primitive(_) => 1,
            Resource::Group(group) => group.members.len(),
        };
        let resources: usize = self.cib.resources.iter().map(members).sum();
        let nodes = self.cib.nodes.len();
        if resources.saturating_mul(nodes) > MAX_SCORES {
            let message = format!("{resources} resources on {nodes} nodes are too many");
            let hint = format!("their product may be {MAX_SCORES} at most");
            self.error(configuration, message, &hint);
        }
    }

    fn configuration(&mut self, configuration: Node<'a, 'a>) {
        for section in children(configuration) {
            match section.tag_name().name() {
                "crm_config" => {
                    self.cib.properties = self.sets(section, "cluster_property_set");
                }
                "rsc_defaults" => {
                    self.cib.resource_defaults = self.sets(section, "meta_attributes");
                }
                "op_defaults" => {
                    self.cib.operation_defaults = self.sets(section, "meta_attributes");
                }
                "nodes" => self.nodes(section),
                "tags" => self.tags(section),
                _ => {}
            }
        }
        if let Some(resources) = child(configuration, "resources") {
            self.resources(resources);
        }
        if let Some(constraints) = child(configuration, "constraints") {
            self.constraints(constraints);
        }
    }

    fn tags(&mut self, section: Node<'a, 'a>) {
        for tag in named(section, "tag") {
            let members = named(tag, "obj_ref").filter_map(|one| one.attribute("id"));
            let members = members.map(str::to_owned).collect();
            if let Some(id) = self.id(tag) {
                self.cib.tags.insert(id, members);
            }
        }
    }

    /// The id of an element, which it must have.
    fn id(&mut self, node: Node<'_, '_>) -> Option<String> {
        match node.attribute("id").filter(|id| !id.is_empty()) {
            Some(id) => Some(id.to_owned()),
            None => {
                let message = format!("<{}> without an id", node.tag_name().name());
                self.error(node, message, "add id=\"...\"");
                None
            }
        }
    }

    /// A score attribute, if it is there; one that is no score is an error.
    fn score(&mut self, node: Node<'_, '_>, name: &str) -> Option<Score> {
        let text = node.attribute(name)?;
        let score = values::score(text);
        if score.is_none() {
            let message = format!(
                "{name}=\"{text}\" of <{}> is no score",
                node.tag_name().name()
            );
            let hint = "a score is a whole number or INFINITY, with an optional sign";
            self.error(node, message, hint);
        }
        score
    }

    /// A truth attribute, if it is there.
    fn truth(&mut self, node: Node<'_, '_>, name: &str) -> Option<bool> {
        let text = node.attribute(name)?;
        let truth = values::truth(text);
        if truth.is_none() {
            self.warn(
                node,
                format!("{name}=\"{text}\" is neither true nor false: ignored"),
            );
        }
        truth
    }

    /// Follows an `id-ref`.
    fn resolve(&mut self, node: Node<'a, 'a>) -> Option<Node<'a, 'a>> {
        let Some(reference) = node.attribute("id-ref") else {
            return Some(node);
        };
        let found = self.ids.get(reference).copied();
        let same = |found: &Node<'_, '_>| found.tag_name() == node.tag_name();
        match found
            .filter(same)
            .filter(|found| found.attribute("id-ref").is_none())
        {
            Some(found) => Some(found),
            None => {
                let name = node.tag_name().name();
                self.warn(
                    node,
                    format!("no <{name}> has the id \"{reference}\": ignored"),
                );
                None
            }
        }
    }
}

/// Child elements.
fn children<'a>(node: Node<'a, 'a>) -> impl Iterator<Item = Node<'a, 'a>> {
    node.children().filter(Node::is_element)
}

/// Child elements with a name.
fn named<'a>(node: Node<'a, 'a>, name: &'static str) -> impl Iterator<Item = Node<'a, 'a>> {
    children(node).filter(move |child| child.tag_name().name() == name)
}

/// The first child element with a name.
fn child<'a>(node: Node<'a, 'a>, name: &'static str) -> Option<Node<'a, 'a>> {
    named(node, name).next()
}

fn owned(node: Node<'_, '_>, name: &str) -> Option<String> {
    node.attribute(name).map(str::to_owned)
}

fn all_attributes(node: Node<'_, '_>) -> BTreeMap<String, String> {
    let own = node.attributes();
    own.map(|one| (one.name().to_owned(), one.value().to_owned()))
        .collect()
}
