//! Progress of long work: moving lines on a terminal, one line per change elsewhere.
//!
//! Goes to standard error, so that results on standard output stay clean.

use indicatif::{MultiProgress, ProgressBar, ProgressStyle};
use std::collections::BTreeMap;
use std::io::{IsTerminal as _, Write as _};
use std::time::{Duration, Instant};

/// Lines of progress, one for each thing that is waited for.
pub(crate) struct Progress {
    bars: Option<MultiProgress>,
    lines: BTreeMap<String, Line>,
    began: Instant,
    quiet: bool,
}

struct Line {
    bar: Option<ProgressBar>,
    text: String,
    done: bool,
}

impl Progress {
    /// `quiet`: nothing is shown (the result is for a program).
    pub(crate) fn new(quiet: bool) -> Self {
        let terminal = std::io::stderr().is_terminal() && !quiet;
        Self {
            bars: terminal.then(MultiProgress::new),
            lines: BTreeMap::new(),
            began: Instant::now(),
            quiet,
        }
    }

    /// Says how one thing stands. Unchanged text is not repeated.
    pub(crate) fn set(&mut self, name: &str, text: &str, done: bool) {
        let bars = &self.bars;
        let line = self.lines.entry(name.to_owned()).or_insert_with(|| Line {
            bar: bars.as_ref().map(|bars| bars.add(spinner(name))),
            text: String::new(),
            done: false,
        });
        if line.done || (line.text == text && !done) {
            return;
        }
        line.text = text.to_owned();
        line.done = done;
        match &line.bar {
            Some(bar) if done => bar.finish_with_message(format!("{text} ✓")),
            Some(bar) => bar.set_message(text.to_owned()),
            None if self.quiet => {}
            None => {
                let seconds = self.began.elapsed().as_secs_f32();
                // Standard error is gone: there is nobody to tell.
                let _ = writeln!(std::io::stderr(), "{seconds:6.1} s  {name}: {text}");
            }
        }
    }

    /// A remark between the lines.
    pub(crate) fn note(&self, text: &str) {
        match &self.bars {
            // A terminal that cannot be written to shows nothing.
            Some(bars) => drop(bars.println(text)),
            None if self.quiet => {}
            None => {
                let _ = writeln!(std::io::stderr(), "          {text}");
            }
        }
    }

    pub(crate) fn elapsed(&self) -> Duration {
        self.began.elapsed()
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        for line in self.lines.values() {
            if let (Some(bar), false) = (&line.bar, line.done) {
                bar.abandon();
            }
        }
    }
}

fn spinner(name: &str) -> ProgressBar {
    let bar = ProgressBar::new_spinner();
    if let Ok(style) = ProgressStyle::with_template("{spinner} {prefix:12} {msg}  {elapsed:.dim}") {
        bar.set_style(style);
    }
    bar.set_prefix(name.to_owned());
    bar.enable_steady_tick(Duration::from_millis(120));
    bar
}
