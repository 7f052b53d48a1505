//! Resources: primitives (with their templates), groups; and what is not supported.

use super::super::model::{AttributeSet, CloneOf, GroupOf, Operation, Primitive, Resource};
use super::super::values;
use super::{Reader, all_attributes, child, children, named, owned};
use roxmltree::Node;

const HINT_CLONE: &str =
    "a VM runs once; a service on every host is not part of a manifest, so it is left out";

impl<'a> Reader<'a> {
    pub(super) fn resources(&mut self, section: Node<'a, 'a>) {
        for template in named(section, "template") {
            if let Some(id) = template.attribute("id") {
                self.templates.insert(id, template);
            }
        }
        self.cib.has_fence_device = section.descendants().any(|node| {
            node.attribute("class") == Some("stonith") && !node.has_tag_name("template")
        });
        for node in children(section) {
            let id = node.attribute("id").unwrap_or("?").to_owned();
            match node.tag_name().name() {
                "primitive" => {
                    if let Some(primitive) = self.primitive(node) {
                        self.cib.resources.push(Resource::Primitive(primitive));
                    }
                }
                "group" => self.group(node),
                "clone" | "master" => {
                    self.unsupported(node, format!("clone \"{id}\""), HINT_CLONE);
                    self.clone_of(node, id);
                }
                "bundle" => {
                    let hint = "containers are not part of a manifest; run them inside a VM";
                    self.unsupported(node, format!("bundle \"{id}\""), hint);
                }
                _ => {}
            }
        }
    }

    fn clone_of(&mut self, node: Node<'a, 'a>, id: String) {
        if let Some(inner) = child(node, "primitive")
            && let Some(primitive) = self.primitive(inner)
        {
            let clone = CloneOf {
                place: self.place(node),
                id,
                meta: self.sets(node, "meta_attributes"),
                primitive,
            };
            self.cib.clones.push(clone);
        }
    }

    fn group(&mut self, node: Node<'a, 'a>) {
        let Some(id) = self.id(node) else { return };
        let mut group = GroupOf {
            id,
            meta: self.sets(node, "meta_attributes"),
            members: Vec::new(),
        };
        self.contained(node, &group.id, &group.meta);
        for member in named(node, "primitive") {
            group.members.extend(self.primitive(member));
        }
        if group.members.is_empty() {
            self.warn(
                node,
                format!("group \"{}\" has no members: ignored", group.id),
            );
            return;
        }
        self.cib.resources.push(Resource::Group(group));
    }

    fn primitive(&mut self, node: Node<'a, 'a>) -> Option<Primitive> {
        let id = self.id(node)?;
        let template = owned(node, "template");
        let base = match &template {
            None => None,
            Some(name) => match self.templates.get(name.as_str()).copied() {
                Some(base) => Some(base),
                None => {
                    let message = format!("resource \"{id}\": there is no template \"{name}\"");
                    self.error(
                        node,
                        message,
                        "add the <template>, or write out the resource",
                    );
                    return None;
                }
            },
        };
        let agent = base.unwrap_or(node);
        let mut primitive = Primitive {
            place: self.place(node),
            class: owned(agent, "class"),
            provider: owned(agent, "provider"),
            kind: owned(agent, "type"),
            id,
            template,
            ..Primitive::default()
        };
        if primitive.kind.as_deref() == Some("remote")
            && primitive.provider.as_deref() == Some("pacemaker")
        {
            let message = format!("connection to a remote node \"{}\"", primitive.id);
            self.unsupported(node, message, "hosts run the Quorate daemon themselves");
            return None;
        }
        for one in base.into_iter().chain([node]) {
            primitive.meta.extend(self.sets(one, "meta_attributes"));
            primitive
                .parameters
                .extend(self.sets(one, "instance_attributes"));
            primitive.utilization.extend(self.sets(one, "utilization"));
            self.operations(one, &mut primitive.operations);
        }
        let remote = |set: &AttributeSet| set.pairs.iter().any(|(name, _)| name == "remote-node");
        if primitive.meta.iter().any(remote) {
            let message = format!("guest node on resource \"{}\"", primitive.id);
            self.unsupported(
                node,
                message,
                "what runs inside a guest is not the cluster's",
            );
        }
        self.contained(node, &primitive.id, &primitive.meta);
        Some(primitive)
    }

    /// What runs inside a container that is a resource itself.
    fn contained(&mut self, node: Node<'a, 'a>, id: &str, meta: &[AttributeSet]) {
        let says = |set: &AttributeSet| set.pairs.iter().any(|(name, _)| name == "container");
        if meta.iter().any(says) {
            let message = format!("resource \"{id}\" inside a container");
            let hint = "what runs inside a guest is not the cluster's";
            self.unsupported(node, message, hint);
        }
    }

    /// Operations of a resource replace those of its template with the same name and interval.
    fn operations(&mut self, node: Node<'a, 'a>, into: &mut Vec<Operation>) {
        let Some(section) = child(node, "operations").and_then(|node| self.resolve(node)) else {
            return;
        };
        for op in named(section, "op") {
            let Some(op) = self.resolve(op) else { continue };
            let interval = op.attribute("interval").unwrap_or("0");
            let interval_ms = values::duration_ms(interval).unwrap_or_else(|| {
                self.warn(
                    op,
                    format!("interval=\"{interval}\" is no duration: 0 is used"),
                );
                0
            });
            let read = Operation {
                name: owned(op, "name").unwrap_or_default(),
                interval_ms,
                attributes: all_attributes(op),
                meta: self.sets(op, "meta_attributes"),
            };
            into.retain(|other| (&other.name, other.interval_ms) != (&read.name, interval_ms));
            into.push(read);
        }
    }
}
