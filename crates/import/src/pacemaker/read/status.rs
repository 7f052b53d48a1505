//! The status section: what the cluster says about its hosts and what happened on them.

use super::super::model::{Event, History, NodeState};
use super::{Reader, child, named, owned};
use roxmltree::Node;

impl<'a> Reader<'a> {
    pub(super) fn status(&mut self, section: Node<'a, 'a>) {
        for node in named(section, "node_state") {
            if node.attribute("remote_node") == Some("true") {
                continue;
            }
            let Some(id) = node.attribute("id") else {
                self.warn(node, "<node_state> without an id: ignored");
                continue;
            };
            let attributes = child(node, "transient_attributes");
            let state = NodeState {
                id: id.to_owned(),
                name: owned(node, "uname"),
                in_ccm: owned(node, "in_ccm"),
                crmd: owned(node, "crmd"),
                join: owned(node, "join"),
                expected: owned(node, "expected"),
                attributes: attributes
                    .map(|node| self.sets(node, "instance_attributes"))
                    .unwrap_or_default(),
                utilization: attributes
                    .map(|node| self.sets(node, "utilization"))
                    .unwrap_or_default(),
                histories: self.histories(node),
            };
            self.cib.states.push(state);
        }
        if child(section, "tickets").is_some_and(|tickets| tickets.has_children()) {
            let tickets = child(section, "tickets").unwrap_or(section);
            let hint = "several sites with tickets have no counterpart in a manifest";
            self.unsupported(tickets, "tickets", hint);
        }
    }

    fn histories(&mut self, state: Node<'a, 'a>) -> Vec<History> {
        let section = child(state, "lrm").and_then(|lrm| child(lrm, "lrm_resources"));
        let mut histories = Vec::new();
        for node in section.into_iter().flat_map(|s| named(s, "lrm_resource")) {
            let Some(resource) = node.attribute("id") else {
                self.warn(node, "<lrm_resource> without an id: ignored");
                continue;
            };
            histories.push(History {
                place: self.place(node),
                resource: resource.to_owned(),
                class: owned(node, "class"),
                provider: owned(node, "provider"),
                kind: owned(node, "type"),
                events: named(node, "lrm_rsc_op").filter_map(event).collect(),
            });
        }
        histories
    }
}

fn event(node: Node<'_, '_>) -> Option<Event> {
    let number = |name: &str| {
        node.attribute(name)
            .and_then(|text| text.trim().parse().ok())
    };
    let id = node.attribute("id")?;
    let key = node.attribute("operation_key").unwrap_or(id);
    let magic = node.attribute("transition-magic");
    Some(Event {
        id: id.to_owned(),
        key: key.to_owned(),
        task: owned(node, "operation")?,
        interval_ms: node
            .attribute("interval")
            .and_then(|text| text.trim().parse().ok())
            .unwrap_or(0),
        status: number("op-status"),
        code: number("rc-code"),
        expected: node.attribute("transition-key").and_then(expected),
        call: number("call-id").map_or(-1, i64::from),
        on_node: owned(node, "on_node"),
        changed: node
            .attribute("last-rc-change")
            .and_then(|text| text.trim().parse().ok()),
        transition: magic.and_then(transition),
        source: owned(node, "migrate_source"),
        target: owned(node, "migrate_target"),
    })
}

/// `action:transition:expected:scheduler`.
fn key_parts(key: &str) -> Option<(i64, i32, &str)> {
    let mut parts = key.splitn(4, ':');
    parts.next()?.parse::<i64>().ok()?;
    let transition = parts.next()?.parse().ok()?;
    let expected = parts.next()?.parse().ok()?;
    Some((transition, expected, parts.next()?))
}

fn expected(key: &str) -> Option<i32> {
    key_parts(key).map(|(_, expected, _)| expected)
}

fn transition(magic: &str) -> Option<(String, i64)> {
    let (_, key) = magic.split_once(';')?;
    key_parts(key).map(|(transition, _, scheduler)| (scheduler.to_lowercase(), transition))
}
