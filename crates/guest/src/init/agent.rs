//! A small guest agent: the commands of QEMU's guest agent that a hypervisor driver needs.
//!
//! Speaks on the virtio port `org.qemu.guest_agent.0`: one JSON command per line.

use crate::power;
use crate::shared::Shared;
use serde_json::{Value, json};
use std::fs::{File, OpenOptions};
use std::io::{Read, Write};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

const PORT: &str = "org.qemu.guest_agent.0";
const MAX_COMMAND: usize = 64 * 1024;

/// Starts the agent, if the machine has its port.
pub(crate) fn start(shared: &Arc<Shared>) {
    if let Some(port) = find_port() {
        let shared = Arc::clone(shared);
        std::thread::spawn(move || serve(port, &shared));
    }
}

fn find_port() -> Option<File> {
    let ports = std::fs::read_dir("/sys/class/virtio-ports").ok()?;
    let port = ports.flatten().find(|port| {
        std::fs::read_to_string(port.path().join("name")).is_ok_and(|name| name.trim() == PORT)
    })?;
    let device = std::path::Path::new("/dev").join(port.file_name());
    OpenOptions::new().read(true).write(true).open(device).ok()
}

fn serve(mut port: File, shared: &Shared) {
    let mut pending = Vec::new();
    let mut buffer = [0; 4096];
    loop {
        match port.read(&mut buffer) {
            // Nobody is connected on the host's side.
            Ok(0) | Err(_) => std::thread::sleep(Duration::from_millis(100)),
            Ok(length) => {
                pending.extend_from_slice(&buffer[..length]);
                while let Some(end) = pending.iter().position(|byte| *byte == b'\n') {
                    let line: Vec<u8> = pending.drain(..=end).collect();
                    let answer = answer(&line, shared);
                    if !answer.is_empty() && !shared.sick.load(Ordering::SeqCst) {
                        let _ = port.write_all(&answer);
                    }
                }
                if pending.len() > MAX_COMMAND {
                    pending.clear();
                }
            }
        }
    }
}

fn answer(line: &[u8], shared: &Shared) -> Vec<u8> {
    // 0xff starts a `guest-sync-delimited`: what came before it is of an earlier client.
    let line = line.rsplit(|byte| *byte == 0xff).next().unwrap_or(line);
    if line.trim_ascii().is_empty() {
        return Vec::new();
    }
    let command: Value = serde_json::from_slice(line).unwrap_or(Value::Null);
    let name = command["execute"].as_str().unwrap_or_default();
    let mut reply = match name {
        "guest-ping" => json!({"return": {}}),
        "guest-sync" | "guest-sync-delimited" => json!({"return": command["arguments"]["id"]}),
        "guest-info" => json!({"return": {"version": "quorate-guest", "supported_commands": []}}),
        "guest-get-host-name" => json!({"return": {"host-name": shared.config.name}}),
        "guest-shutdown" => {
            power::ask(shared, "guest agent");
            return Vec::new();
        }
        _ => json!({"error": {"class": "CommandNotFound", "desc": format!("no command `{name}`")}}),
    };
    if let Some(id) = command.get("id") {
        reply["id"] = id.clone();
    }
    let mut bytes = Vec::new();
    if name == "guest-sync-delimited" {
        bytes.push(0xff);
    }
    bytes.extend_from_slice(reply.to_string().as_bytes());
    bytes.push(b'\n');
    bytes
}
