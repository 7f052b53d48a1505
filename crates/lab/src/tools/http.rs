//! Asks a guest's web server for one page again and again, as a visitor would: each request on a connection of
//! its own.
//!
//! Always holds: a request that is not answered in full with status 200 is in the report as failed, with the reason.

use super::end_of_input;
use serde::{Deserialize, Serialize};
use std::collections::BTreeSet;
use std::io::{Read as _, Write as _};
use std::net::{SocketAddr, TcpStream};
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

/// For one request: a visitor gives up after some time.
const LIMIT: Duration = Duration::from_secs(5);
/// Largest answer that is read.
const MAX_ANSWER: u64 = 1024 * 1024;
/// Failures and bodies kept.
const KEPT: usize = 20;

/// Arguments of the tool.
#[derive(Debug, Clone, clap::Args)]
pub struct HttpArgs {
    /// Address and port of the web server.
    pub target: SocketAddr,
    /// The page.
    pub path: String,
    /// At least so many requests, also when the input ends before.
    #[arg(long, default_value_t = 1)]
    pub at_least: u64,
    /// Time between the end of a request and the next one, in milliseconds.
    #[arg(long, default_value_t = 20)]
    pub interval_ms: u64,
}

/// Result.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct HttpReport {
    /// Requests made.
    pub asked: u64,
    /// Requests answered with status 200.
    pub good: u64,
    /// Why others failed, the first ones.
    pub failures: Vec<String>,
    /// Different bodies that came, the first ones.
    pub bodies: BTreeSet<String>,
    /// Longest request that was answered, in microseconds.
    pub longest_us: u64,
}

/// Asks until the standard input ends.
pub fn run(args: &HttpArgs) -> HttpReport {
    let ended = end_of_input();
    let mut report = HttpReport::default();
    while !ended.load(Ordering::SeqCst) || report.asked < args.at_least {
        let begun = Instant::now();
        report.asked += 1;
        match ask(args) {
            Ok(body) => {
                let took = u64::try_from(begun.elapsed().as_micros()).unwrap_or(u64::MAX);
                report.good += 1;
                report.longest_us = report.longest_us.max(took);
                if report.bodies.len() < KEPT {
                    report.bodies.insert(body);
                }
            }
            Err(why) if report.failures.len() < KEPT => {
                report
                    .failures
                    .push(format!("request {}: {why}", report.asked));
            }
            Err(_) => {}
        }
        crate::wait::pause(Duration::from_millis(args.interval_ms));
    }
    report
}

fn ask(args: &HttpArgs) -> Result<String, String> {
    let words = |error: std::io::Error| error.to_string();
    let mut stream = TcpStream::connect_timeout(&args.target, LIMIT).map_err(words)?;
    stream.set_read_timeout(Some(LIMIT)).map_err(words)?;
    stream.set_write_timeout(Some(LIMIT)).map_err(words)?;
    let question = format!(
        "GET {} HTTP/1.0\r\nHost: {}\r\n\r\n",
        args.path,
        args.target.ip()
    );
    stream.write_all(question.as_bytes()).map_err(words)?;
    let mut answer = Vec::new();
    stream
        .take(MAX_ANSWER)
        .read_to_end(&mut answer)
        .map_err(words)?;
    understand(&String::from_utf8_lossy(&answer))
}

/// The body of a whole answer with status 200.
fn understand(answer: &str) -> Result<String, String> {
    let (head, body) = answer
        .split_once("\r\n\r\n")
        .ok_or_else(|| format!("the answer ends after {} bytes", answer.len()))?;
    let status = head.lines().next().unwrap_or_default();
    if status.split(' ').nth(1) != Some("200") {
        return Err(format!("the answer is `{status}`"));
    }
    let length = head.lines().find_map(|line| {
        let (name, value) = line.split_once(':')?;
        let value = value.trim().parse::<usize>().ok()?;
        name.eq_ignore_ascii_case("content-length").then_some(value)
    });
    match length {
        Some(length) if length != body.len() => {
            Err(format!("{} of {length} bytes came", body.len()))
        }
        _ => Ok(body.trim().to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_whole_good_answers_count() {
        let answer = |head: &str, body: &str| understand(&format!("{head}\r\n\r\n{body}"));
        assert_eq!(
            answer("HTTP/1.1 200 OK\r\nContent-Length: 3", "ab\n").unwrap(),
            "ab"
        );
        assert_eq!(answer("HTTP/1.0 200 OK", "x").unwrap(), "x");
        let short = answer("HTTP/1.1 200 OK\r\ncontent-length: 30", "ab");
        assert!(short.unwrap_err().contains("2 of 30"));
        assert!(answer("HTTP/1.1 502 Bad Gateway", "").is_err());
        assert!(understand("").is_err());
    }
}
