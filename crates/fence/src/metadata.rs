//! What an agent says about itself: XML of the FenceAgentAPI, of which a few facts are read.
//!
//! Agents differ and their XML is not always well formed, so this looks for tags and skips
//! what it does not know; it never fails.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

/// An agent's description.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct AgentMetadata {
    /// Its name.
    pub name: String,
    /// What it is for, in a few words.
    pub summary: String,
    /// The options it takes, in its order.
    pub parameters: Vec<AgentParameter>,
    /// The actions it knows.
    pub actions: Vec<String>,
}

/// One option of an agent.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct AgentParameter {
    /// Its name.
    pub name: String,
    /// Whether the agent insists on it.
    pub required: bool,
    /// Whether another name replaced it.
    pub deprecated: bool,
    /// What it is for.
    pub summary: String,
}

impl AgentMetadata {
    /// Reads what can be read.
    pub fn parse(xml: &str) -> Self {
        let mut metadata = Self::default();
        let mut rest = xml;
        let mut open: Option<AgentParameter> = None;
        while let Some(start) = rest.find('<') {
            rest = &rest[start + 1..];
            let Some(end) = rest.find('>') else { break };
            let tag = rest[..end].trim_end_matches('/');
            rest = &rest[end + 1..];
            let (kind, attributes) = tag.split_once(char::is_whitespace).unwrap_or((tag, ""));
            let attribute = |name: &str| attribute_map(attributes).remove(name);
            match kind {
                "resource-agent" => {
                    metadata.name = attribute("name").unwrap_or_default();
                    metadata.summary = attribute("shortdesc").unwrap_or_default();
                }
                "parameter" => {
                    open = attribute("name").map(|name| AgentParameter {
                        name,
                        required: attribute("required").as_deref() == Some("1"),
                        deprecated: attribute("deprecated").as_deref() == Some("1"),
                        summary: String::new(),
                    });
                }
                "shortdesc" => {
                    if let Some(parameter) = &mut open {
                        parameter.summary = unescape(rest.split('<').next().unwrap_or("").trim());
                    }
                }
                "/parameter" => metadata.parameters.extend(open.take()),
                "action" => metadata.actions.extend(attribute("name")),
                _ => {}
            }
        }
        metadata
    }
}

/// `a="1" b='2'` as a map.
fn attribute_map(mut text: &str) -> BTreeMap<String, String> {
    let mut map = BTreeMap::new();
    while let Some((name, rest)) = text.split_once('=') {
        let rest = rest.trim_start();
        let Some(quote) = rest.chars().next().filter(|c| matches!(c, '"' | '\'')) else {
            break;
        };
        let Some((value, rest)) = rest[1..].split_once(quote) else {
            break;
        };
        map.insert(name.trim().to_owned(), unescape(value));
        text = rest;
    }
    map
}

fn unescape(text: &str) -> String {
    text.replace("&lt;", "<")
        .replace("&gt;", ">")
        .replace("&quot;", "\"")
        .replace("&apos;", "'")
        .replace("&amp;", "&")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_usual_shape_is_read() {
        let metadata = AgentMetadata::parse(
            r#"<?xml version="1.0" ?>
            <resource-agent name="fence_x" shortdesc="Fence &lt;agent&gt; for X" >
            <longdesc>Long &amp; boring</longdesc>
            <parameters>
              <parameter name="action" unique="0" required="1">
                <getopt mixed="-o, --action=[action]" />
                <content type="string" default="reboot"  />
                <shortdesc lang="en">Fencing action</shortdesc>
              </parameter>
              <parameter name="ipaddr" required="0" deprecated="1"><shortdesc>IP</shortdesc></parameter>
            </parameters>
            <actions><action name="on" automatic="0"/><action name='off' /></actions>
            </resource-agent>"#,
        );
        assert_eq!(metadata.name, "fence_x");
        assert_eq!(metadata.summary, "Fence <agent> for X");
        assert_eq!(metadata.actions, ["on", "off"]);
        assert_eq!(metadata.parameters.len(), 2);
        assert!(metadata.parameters[0].required && !metadata.parameters[0].deprecated);
        assert_eq!(metadata.parameters[0].summary, "Fencing action");
        assert!(metadata.parameters[1].deprecated && !metadata.parameters[1].required);
    }

    #[test]
    fn garbage_is_survived() {
        for garbage in [
            "",
            "<",
            "<<>>",
            "<parameter",
            "<parameter name=>",
            "<parameter name=\"x>",
            "</parameter>",
            "a=b<action name=é>",
        ] {
            assert_eq!(AgentMetadata::parse(garbage).parameters, []);
        }
    }
}
