//! Positions and messages that point into the operator's file.
//!
//! Owns: the rendering of a diagnostic, in the form compilers use. Always holds: a rendered message
//! contains no control characters of the input (nothing a terminal would obey), and its size is
//! bounded whatever the input. Must not: read files; the text is handed in.

use serde::{Deserialize, Serialize};
use std::fmt;

/// Most diagnostics that one parse returns; the rest is counted.
pub const MAX_DIAGNOSTICS: usize = 50;

/// Widest excerpt of a source line, in characters.
const MAX_EXCERPT: usize = 120;

/// A place in the file. Lines and columns count from 1, columns in characters.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Span {
    /// Line.
    pub line: usize,
    /// Column of the first character.
    pub column: usize,
    /// Characters that the caret line covers; at least 1.
    pub width: usize,
}

/// One thing that is wrong, with its place.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Diagnostic {
    /// File as the operator named it.
    pub file: String,
    /// Where.
    #[serde(flatten)]
    pub span: Span,
    /// What is wrong, in one line.
    pub message: String,
    /// What to do about it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub hint: Option<String>,
    /// The source line, made safe for a terminal.
    pub excerpt: String,
    /// Columns cut off at the left of [`Self::excerpt`].
    #[serde(default)]
    pub excerpt_from: usize,
}

impl fmt::Display for Diagnostic {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let gutter = self.span.line.to_string().len();
        writeln!(f, "error: {}", self.message)?;
        writeln!(
            f,
            "{:gutter$}--> {}:{}:{}",
            "", self.file, self.span.line, self.span.column
        )?;
        writeln!(f, "{:gutter$} |", "")?;
        writeln!(f, "{} | {}", self.span.line, self.excerpt)?;
        let before = self.span.column.saturating_sub(1 + self.excerpt_from);
        let room = MAX_EXCERPT.saturating_sub(before).max(1);
        let carets = "^".repeat(self.span.width.clamp(1, room));
        write!(f, "{:gutter$} | {:before$}{carets}", "", "")?;
        if let Some(hint) = &self.hint {
            write!(f, "\n{:gutter$} = help: {hint}", "")?;
        }
        Ok(())
    }
}

/// Why a manifest was refused: everything that could be found in one go.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Diagnostics {
    /// In the order of the file, at most [`MAX_DIAGNOSTICS`].
    pub items: Vec<Diagnostic>,
    /// Further ones that were left out.
    #[serde(default)]
    pub omitted: usize,
}

impl fmt::Display for Diagnostics {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, item) in self.items.iter().enumerate() {
            if index > 0 {
                f.write_str("\n\n")?;
            }
            item.fmt(f)?;
        }
        if self.omitted > 0 {
            write!(f, "\n\nand {} more", self.omitted)?;
        }
        Ok(())
    }
}

impl std::error::Error for Diagnostics {}

/// The text of a manifest with its name, for excerpts.
#[derive(Debug, Clone)]
pub(crate) struct Source {
    file: String,
    lines: Vec<String>,
}

impl Source {
    pub(crate) fn new(text: &str, file: &str) -> Self {
        Self {
            file: printable(file),
            lines: text.lines().map(printable).collect(),
        }
    }

    pub(crate) fn diagnostic(&self, found: Finding) -> Diagnostic {
        let line = self
            .lines
            .get(found.span.line.saturating_sub(1))
            .map_or("", String::as_str);
        let length = line.chars().count();
        let mut span = found.span;
        span.width = span
            .width
            .min((length + 1).saturating_sub(span.column))
            .max(1);
        let from = if length <= MAX_EXCERPT || span.column < MAX_EXCERPT - 20 {
            0
        } else {
            span.column - 40
        };
        Diagnostic {
            file: self.file.clone(),
            span,
            message: printable(&found.message),
            hint: found.hint.as_deref().map(printable),
            excerpt: line
                .chars()
                .skip(from)
                .take(MAX_EXCERPT)
                .collect::<String>()
                .trim_end()
                .to_owned(),
            excerpt_from: from,
        }
    }

    /// Sorts by place, drops repetitions and cuts to the bound.
    pub(crate) fn diagnostics(&self, mut found: Vec<Finding>) -> Diagnostics {
        found.sort_by(|a, b| (a.span, &a.message).cmp(&(b.span, &b.message)));
        found.dedup();
        let omitted = found.len().saturating_sub(MAX_DIAGNOSTICS);
        found.truncate(MAX_DIAGNOSTICS);
        Diagnostics {
            items: found.into_iter().map(|f| self.diagnostic(f)).collect(),
            omitted,
        }
    }
}

/// A message with its place, before the excerpt is added.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Finding {
    pub(crate) span: Span,
    pub(crate) message: String,
    pub(crate) hint: Option<String>,
}

impl Finding {
    pub(crate) fn new(span: Span, message: impl Into<String>) -> Self {
        Self {
            span,
            message: message.into(),
            hint: None,
        }
    }

    pub(crate) fn hint(mut self, hint: impl Into<String>) -> Self {
        self.hint = Some(hint.into());
        self
    }

    pub(crate) fn maybe_hint(mut self, hint: Option<String>) -> Self {
        self.hint = hint.or(self.hint);
        self
    }
}

/// One character in, one character out, so that columns stay right.
fn printable(text: &str) -> String {
    text.chars()
        .map(|c| match c {
            '\t' => ' ',
            // Control characters, and those that reverse the direction of writing.
            c if c.is_control() => '\u{fffd}',
            '\u{200e}' | '\u{200f}' | '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}' => {
                '\u{fffd}'
            }
            c => c,
        })
        .collect()
}
