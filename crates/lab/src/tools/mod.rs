//! Tools that run beside the guests, as processes of their own in a namespace of the site.
//!
//! Always holds: a tool works until its standard input ends, then prints one line of JSON; so it
//! never outlives the program that started it.

pub mod acks;
pub mod capture;
pub mod http;
pub mod impostor;
pub mod load;
pub mod pinger;
pub mod status;

use crate::lab::Lab;
use crate::site::CLIENT;
use crate::{LabError, Result, wait};
use serde::de::DeserializeOwned;
use std::io::Read as _;
use std::marker::PhantomData;
use std::net::Ipv4Addr;
use std::process::{Child, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

/// For a tool to print its report after its input ended.
const REPORT_LIMIT: Duration = Duration::from_secs(10);

/// A running tool that will report an `R`.
#[derive(Debug)]
pub struct Tool<R> {
    name: &'static str,
    child: Child,
    report: PhantomData<R>,
}

impl<R: DeserializeOwned> Tool<R> {
    fn start(lab: &Lab, name: &'static str, arguments: &[String]) -> Result<Self> {
        Self::start_in(lab, CLIENT, name, arguments)
    }

    /// Starts a tool in a part of the site.
    fn start_in(lab: &Lab, part: &str, name: &'static str, arguments: &[String]) -> Result<Self> {
        let tool = &lab.site().tool;
        let missing = |source| LabError::MissingTool {
            tool: tool.join(" "),
            source,
        };
        let Some((program, rest)) = tool.split_first() else {
            return Err(missing(std::io::ErrorKind::NotFound.into()));
        };
        let child = lab
            .command(part, program)
            .args(rest)
            .arg(name)
            .args(arguments)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .map_err(missing)?;
        Ok(Self {
            name,
            child,
            report: PhantomData,
        })
    }

    /// Ends the tool and reads its report.
    pub fn finish(mut self) -> Result<R> {
        drop(self.child.stdin.take());
        let output = self.child.stdout.take();
        let reader = std::thread::spawn(move || {
            let mut text = String::new();
            if let Some(mut output) = output {
                let _ = output.read_to_string(&mut text);
            }
            text
        });
        let step = Duration::from_millis(2);
        wait::until(
            &format!("report of the {}", self.name),
            REPORT_LIMIT,
            step,
            || self.child.try_wait().ok().flatten(),
        )?;
        let text = reader.join().unwrap_or_default();
        serde_json::from_str(&text).map_err(|_| LabError::Answer {
            tool: self.name.to_owned(),
            output: text,
        })
    }
}

impl<R> Drop for Tool<R> {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Lab {
    /// Pings a guest from the client every `interval`.
    pub fn pinger(&self, guest: Ipv4Addr, interval: Duration) -> Result<Tool<pinger::PingReport>> {
        let target = format!("{guest}:{}", quorate_guest::ECHO_PORT);
        let interval = interval.as_micros().to_string();
        Tool::start(
            self,
            "pinger",
            &[target, "--interval-us".to_owned(), interval],
        )
    }

    /// Asks a guest how it is, from the client.
    pub fn guest_status(&self, guest: Ipv4Addr) -> Result<status::GuestStatus> {
        let target = format!("{guest}:{}", quorate_guest::CONTROL_PORT);
        Tool::start(self, "guest-status", &[target])?.finish()
    }

    /// Tells a guest something, from the client: `sick`, `well`, `rogue 10.77.0.9`.
    pub fn tell_guest(&self, guest: Ipv4Addr, word: &str) -> Result<()> {
        let target = format!("{guest}:{}", quorate_guest::CONTROL_PORT);
        let arguments = [target, word.to_owned()];
        let told: bool = Tool::start(self, "guest-status", &arguments)?.finish()?;
        match told {
            true => Ok(()),
            false => Err(LabError::Answer {
                tool: "guest-status".to_owned(),
                output: "false".to_owned(),
            }),
        }
    }

    /// Asks a guest's web server for a page again and again, 20 ms apart, from the client; at least so many times.
    pub fn visitor(
        &self,
        guest: Ipv4Addr,
        path: &str,
        at_least: u64,
    ) -> Result<Tool<http::HttpReport>> {
        let target = format!("{guest}:80");
        let at_least = at_least.to_string();
        let arguments = [target, path.to_owned(), "--at-least".to_owned(), at_least];
        Tool::start(self, "visitor", &arguments)
    }

    /// Holds connections to a service or to several servers, from the client. Its report so far: [`Lab::load_so_far`].
    pub fn load(&self, load: &load::LoadArgs) -> Result<Tool<load::LoadReport>> {
        let state = self.load_state();
        let _ = std::fs::remove_file(&state);
        let mut arguments = vec![
            format!("--connections={}", load.connections),
            format!("--interval-us={}", load.interval_us),
            format!("--fresh-ms={}", load.fresh_ms),
            format!("--state={}", state.display()),
        ];
        arguments.extend(load.targets.iter().map(ToString::to_string));
        Tool::start(self, "load", &arguments)
    }

    fn load_state(&self) -> std::path::PathBuf {
        self.site().dir.join("load.json")
    }

    /// What the load tool has seen so far; `None` until it has written something.
    #[must_use]
    pub fn load_so_far(&self) -> Option<load::LoadReport> {
        let bytes = std::fs::read(self.load_state()).ok()?;
        serde_json::from_slice(&bytes).ok()
    }

    /// Notes what the switch's ports of these parts receive on a network from MAC addresses that begin with `source`.
    pub fn capture(
        &self,
        network: &str,
        parts: &[&str],
        source: &str,
    ) -> Result<Tool<capture::CaptureReport>> {
        let mut ports: Vec<String> = parts
            .iter()
            .map(|part| format!("{network}-{part}"))
            .collect();
        ports.push(format!("--source={source}"));
        Tool::start_in(self, "switch", "capture", &ports)
    }

    /// Claims an address, from the client.
    pub fn impostor(&self, address: Ipv4Addr) -> Result<Tool<impostor::ImpostorReport>> {
        let arguments = ["lan0".to_owned(), address.to_string()];
        Tool::start(self, "impostor", &arguments)
    }

    /// Collects what a guest acknowledges, at the client.
    pub fn ack_collector(&self, guest: Ipv4Addr) -> Result<Tool<acks::AckReport>> {
        let target = format!("{guest}:{}", quorate_guest::CONTROL_PORT);
        Tool::start(self, "acks", &[target])
    }
}

/// A flag that is set when the standard input ends.
fn end_of_input() -> Arc<AtomicBool> {
    let ended = Arc::new(AtomicBool::new(false));
    let flag = Arc::clone(&ended);
    std::thread::spawn(move || {
        let mut rest = [0; 64];
        while matches!(std::io::stdin().read(&mut rest), Ok(1..)) {}
        flag.store(true, Ordering::SeqCst);
    });
    ended
}
