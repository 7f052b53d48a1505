//! Constraints: location, colocation, order.

use super::super::model::{Colocation, Constraint, Location, Ordering, ResourceSet};
use super::{Reader, children, named, owned};
use roxmltree::Node;

impl<'a> Reader<'a> {
    pub(super) fn constraints(&mut self, section: Node<'a, 'a>) {
        for node in children(section) {
            match node.tag_name().name() {
                "rsc_location" => self.location(node),
                "rsc_colocation" => self.colocation(node),
                "rsc_order" => self.order(node),
                "rsc_ticket" => {
                    let id = node.attribute("id").unwrap_or("?");
                    let message = format!("ticket constraint \"{id}\"");
                    let hint = "several sites with tickets have no counterpart in a manifest";
                    self.unsupported(node, message, hint);
                }
                other => self.warn(
                    node,
                    format!("a constraint <{other}> is not known: ignored"),
                ),
            }
        }
    }

    fn location(&mut self, node: Node<'a, 'a>) {
        let Some(id) = self.id(node) else { return };
        let mut location = Location {
            place: self.place(node),
            id,
            resource: owned(node, "rsc"),
            pattern: owned(node, "rsc-pattern"),
            sets: self.resource_sets(node),
            node: owned(node, "node"),
            score: self.score(node, "score"),
            role: owned(node, "role"),
            rules: Vec::new(),
            discovery: owned(node, "resource-discovery"),
        };
        for rule in named(node, "rule") {
            location.rules.extend(self.rule(rule));
        }
        self.cib.constraints.push(Constraint::Location(location));
    }

    fn colocation(&mut self, node: Node<'a, 'a>) {
        let Some(id) = self.id(node) else { return };
        let colocation = Colocation {
            place: self.place(node),
            id,
            score: self.score(node, "score").unwrap_or(0),
            resource: owned(node, "rsc"),
            with: owned(node, "with-rsc"),
            resource_role: owned(node, "rsc-role"),
            with_role: owned(node, "with-rsc-role"),
            attribute: owned(node, "node-attribute"),
            influence: self.truth(node, "influence"),
            sets: self.resource_sets(node),
        };
        let ends = colocation.resource.is_some() && colocation.with.is_some();
        if colocation.sets.is_empty() && !ends {
            let message = format!("colocation \"{}\" does not say of what", colocation.id);
            self.error(node, message, "give rsc=\"...\" and with-rsc=\"...\"");
            return;
        }
        self.cib
            .constraints
            .push(Constraint::Colocation(colocation));
    }

    fn order(&mut self, node: Node<'a, 'a>) {
        let Some(id) = self.id(node) else { return };
        let order = Ordering {
            place: self.place(node),
            id,
            first: owned(node, "first"),
            then: owned(node, "then"),
            first_action: owned(node, "first-action"),
            then_action: owned(node, "then-action"),
            kind: owned(node, "kind"),
            score: self.score(node, "score"),
            symmetrical: self.truth(node, "symmetrical"),
            sets: self.resource_sets(node),
        };
        if order.sets.is_empty() && (order.first.is_none() || order.then.is_none()) {
            let message = format!("order \"{}\" does not say of what", order.id);
            self.error(node, message, "give first=\"...\" and then=\"...\"");
            return;
        }
        self.cib.constraints.push(Constraint::Order(order));
    }

    fn resource_sets(&mut self, node: Node<'a, 'a>) -> Vec<ResourceSet> {
        let mut sets = Vec::new();
        for set in named(node, "resource_set") {
            let Some(set) = self.resolve(set) else {
                continue;
            };
            let members = named(set, "resource_ref").filter_map(|one| owned(one, "id"));
            sets.push(ResourceSet {
                place: self.place(set),
                members: members.collect(),
                sequential: self.truth(set, "sequential"),
                require_all: self.truth(set, "require-all"),
                action: owned(set, "action"),
                role: owned(set, "role"),
                score: self.score(set, "score"),
                kind: owned(set, "kind"),
                ordering: owned(set, "ordering"),
            });
        }
        sets
    }
}
