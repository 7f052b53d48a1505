//! `${NAME}` and `${NAME:-default}` in values, as in compose files.
//!
//! Always holds: substitution happens after the YAML is read, so a variable's content can never
//! change the structure of the manifest; keys are never substituted. `$$` stands for `$`.

use std::collections::{BTreeMap, BTreeSet};

/// Longest value after substitution, in bytes.
const MAX_VALUE: usize = 64 * 1024;

/// What is wrong with a reference.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct BadReference {
    pub(crate) message: String,
    pub(crate) hint: String,
}

/// The names of all variables that the text refers to (a superset: comments are looked at too), so
/// that a client sends these and nothing else of its environment.
pub fn variables_used(text: &str) -> BTreeSet<String> {
    let mut names = BTreeSet::new();
    for (at, _) in text.match_indices("${") {
        let name: String = text[at + 2..]
            .chars()
            .take_while(|c| is_name_character(*c))
            .collect();
        if !name.is_empty() {
            names.insert(name);
        }
    }
    names
}

/// Replaces the references; a text without `$` is returned unchanged.
pub(crate) fn substitute(
    text: &str,
    variables: &BTreeMap<String, String>,
) -> Result<String, BadReference> {
    let mut out = String::with_capacity(text.len());
    let mut rest = text;
    while let Some(at) = rest.find('$') {
        out.push_str(&rest[..at]);
        let after = &rest[at + 1..];
        if let Some(tail) = after.strip_prefix('$') {
            out.push('$');
            rest = tail;
        } else if let Some(tail) = after.strip_prefix('{') {
            let Some(end) = tail.find('}') else {
                return Err(BadReference {
                    message: "`${` is not closed".to_owned(),
                    hint: "write `${NAME}` or `${NAME:-default}`, and `$$` for a plain `$`"
                        .to_owned(),
                });
            };
            out.push_str(resolve(&tail[..end], variables)?);
            rest = &tail[end + 1..];
        } else {
            out.push('$');
            rest = after;
        }
        if out.len() > MAX_VALUE {
            return Err(BadReference {
                message: format!("the value is longer than {MAX_VALUE} bytes after substitution"),
                hint: "shorten the variable".to_owned(),
            });
        }
    }
    out.push_str(rest);
    Ok(out)
}

fn resolve<'a>(
    inner: &'a str,
    variables: &'a BTreeMap<String, String>,
) -> Result<&'a str, BadReference> {
    let (name, default) = match inner.split_once(":-") {
        Some((name, default)) => (name, Some(default)),
        None => (inner, None),
    };
    if name.is_empty() || !name.chars().all(is_name_character) {
        return Err(BadReference {
            message: format!("`${{{inner}}}` is not a variable"),
            hint: "write `${NAME}` or `${NAME:-default}`, and `$$` for a plain `$`".to_owned(),
        });
    }
    match (variables.get(name), default) {
        (Some(value), None) => Ok(value),
        (Some(value), Some(default)) if value.is_empty() => Ok(default),
        (Some(value), Some(_)) => Ok(value),
        (None, Some(default)) => Ok(default),
        (None, None) => Err(BadReference {
            message: format!("the variable `{name}` is not set"),
            hint: format!("set it in the environment, or write `${{{name}:-default}}`"),
        }),
    }
}

fn is_name_character(c: char) -> bool {
    c.is_ascii_alphanumeric() || c == '_'
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn with(text: &str) -> Result<String, BadReference> {
        let variables = [
            ("K".to_owned(), "/boot/k".to_owned()),
            ("E".to_owned(), String::new()),
        ];
        substitute(text, &BTreeMap::from(variables))
    }

    #[test]
    fn follows_compose() {
        assert_eq!(with("a${K}b").unwrap(), "a/boot/kb");
        assert_eq!(with("${N:-d}").unwrap(), "d");
        assert_eq!(with("${E:-d}").unwrap(), "d");
        assert_eq!(with("${E}").unwrap(), "");
        assert_eq!(with("cost $$5 $x").unwrap(), "cost $5 $x");
        assert!(with("${N}").is_err());
        assert!(with("${K").is_err());
        assert!(with("${}").is_err());
        assert!(with("${a b}").is_err());
    }

    #[test]
    fn only_names_in_the_text_are_asked_for() {
        let used = variables_used("a: ${A}\nb: '${B_1:-x}' $C ${}");
        assert_eq!(used, BTreeSet::from(["A".to_owned(), "B_1".to_owned()]));
    }
}
