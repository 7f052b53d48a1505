//! The manifest: what the operator writes, read strictly and answered precisely.
//!
//! Owns: reading YAML or JSON into [`quorate_types::Manifest`] ([`parse`]), the rules between objects
//! ([`check`]), what would change ([`diff`]), and the messages for all of it. Always holds: every
//! refusal names file, line and column and says what to do; as many errors as can be found are
//! found in one go; input of any kind costs bounded memory and time. Must not: do I/O, read the
//! environment (variables are handed in), or know what hosts report.

mod check;
mod diff;
mod json_schema;
mod keep;
mod scalars;
mod schema;
mod source;
mod suggest;
mod tree;
mod variables;
mod walk;

pub use check::{Existing, Problem, check};
pub use diff::{Change, ChangeKind, FieldChange, diff};
pub use json_schema::json_schema;
pub use source::{Diagnostic, Diagnostics, MAX_DIAGNOSTICS, Span};
pub use suggest::nearest;
pub use variables::variables_used;

use quorate_types::Manifest;
use source::{Finding, Source};
use std::collections::BTreeMap;

/// Largest manifest, in bytes.
pub const MAX_INPUT: usize = 1 << 20;

/// A manifest that could be read, with the places of everything in it.
#[derive(Debug, Clone)]
pub struct ParsedManifest {
    /// What it says.
    pub manifest: Manifest,
    places: walk::Places,
    source: Source,
}

/// Reads a manifest. `file` is only used in messages; `variables` replace `${NAME}` in values. Settings that it does not
/// name have their defaults.
pub fn parse(
    text: &str,
    file: &str,
    variables: &BTreeMap<String, String>,
) -> Result<ParsedManifest, Diagnostics> {
    read(text, file, variables, None)
}

fn read(
    text: &str,
    file: &str,
    variables: &BTreeMap<String, String>,
    existing: Option<&Existing>,
) -> Result<ParsedManifest, Diagnostics> {
    if text.len() > MAX_INPUT {
        let source = Source::new("", file);
        let message = format!(
            "the manifest has {} bytes; at most {MAX_INPUT} are accepted",
            text.len()
        );
        let finding =
            Finding::new(tree::start(), message).hint("split it and apply the parts one by one");
        return Err(source.diagnostics(vec![finding]));
    }
    let text = text.strip_prefix('\u{feff}').unwrap_or(text);
    let source = Source::new(text, file);
    let root = tree::read(text).map_err(|found| source.diagnostics(found))?;
    let mut walk = walk::Walk::new(variables);
    let Some(mut value) = walk.manifest(&root) else {
        return Err(source.diagnostics(walk.findings));
    };
    if let Some(existing) = existing {
        keep::keep(&mut value, existing);
    }
    match serde_json::from_value(value) {
        Ok(manifest) => Ok(ParsedManifest {
            manifest,
            places: walk.places,
            source,
        }),
        Err(error) => {
            let finding = Finding::new(tree::start(), error.to_string());
            Err(source.diagnostics(vec![finding]))
        }
    }
}

/// [`parse`] and [`check`] in one step, for a cluster: settings that the manifest does not name stay as they are there.
pub fn load(
    text: &str,
    file: &str,
    variables: &BTreeMap<String, String>,
    existing: &Existing,
) -> Result<ParsedManifest, Diagnostics> {
    let parsed = read(text, file, variables, Some(existing))?;
    let problems = check(&parsed.manifest, existing);
    if problems.is_empty() {
        Ok(parsed)
    } else {
        Err(parsed.diagnose(&problems))
    }
}

impl ParsedManifest {
    /// Gives problems their places in the file. A path that is not in the file is looked up by its
    /// longest part that is.
    #[must_use]
    pub fn diagnose(&self, problems: &[Problem]) -> Diagnostics {
        let findings = problems
            .iter()
            .map(|problem| Finding {
                span: self.place(&problem.path),
                message: problem.message.clone(),
                hint: problem.hint.clone(),
            })
            .collect();
        self.source.diagnostics(findings)
    }

    /// The place of a path such as `["vms", "app", "memory"]`.
    #[must_use]
    pub fn place(&self, path: &[String]) -> Span {
        (0..=path.len())
            .rev()
            .find_map(|length| {
                let place = self.places.get(&path[..length])?;
                place.value.or(place.key)
            })
            .unwrap_or_else(tree::start)
    }
}
