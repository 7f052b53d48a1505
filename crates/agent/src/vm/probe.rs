//! Ready checks: tried until the first success.

use super::{Live, Shared};
use quorate_agent_logic::GuestEvent;
use quorate_types::VmName;
use quorate_types::spec::{HttpProbe, Probe};
use std::io::{Read as _, Seek as _, SeekFrom};
use std::net::SocketAddr;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio::time::{sleep, timeout};

const EVERY: Duration = Duration::from_millis(200);
const WITHIN: Duration = Duration::from_secs(2);
/// How much of the serial log is read at a time.
const PIECE_BYTES: u64 = 256 * 1024;
/// Longest text that is looked for.
const TEXT_MAX: usize = 4096;

/// Probes until the guest is ready; ended with the process.
pub(super) async fn run(shared: Arc<Shared>, vm: VmName, live: Live, probe: Probe) {
    let log = shared.layout.serial_log(&vm);
    let begins = tokio::fs::read_to_string(shared.layout.serial_begins(&vm)).await;
    let begins = begins.ok().and_then(|text| text.trim().parse().ok());
    let mut serial = SerialSearch::new(begins.unwrap_or(0));
    loop {
        let ready = match &probe {
            Probe::Tcp(tcp) => {
                let address = SocketAddr::new(tcp.address, tcp.port);
                let connected = timeout(WITHIN, TcpStream::connect(address)).await;
                matches!(connected, Ok(Ok(_)))
            }
            Probe::Http(http) => timeout(WITHIN, get(http)).await.is_ok_and(|good| good),
            Probe::Agent => live.guest.ping_agent(WITHIN).await.is_ok(),
            Probe::Serial(text) => {
                let (text, log) = (text.clone(), log.clone());
                let search = move || {
                    let found = serial.find(&log, text.as_bytes());
                    (found, serial)
                };
                let Ok((found, next)) = tokio::task::spawn_blocking(search).await else {
                    return;
                };
                serial = next;
                found
            }
        };
        if ready {
            return shared.tell(&vm, live.run, GuestEvent::Ready).await;
        }
        sleep(EVERY).await;
    }
}

/// A minimal HTTP/1.0 GET; ready when the status is 200 to 399.
async fn get(http: &HttpProbe) -> bool {
    let request = async {
        let mut stream = TcpStream::connect(SocketAddr::new(http.address, http.port)).await?;
        let host = match http.address {
            std::net::IpAddr::V4(address) => address.to_string(),
            std::net::IpAddr::V6(address) => format!("[{address}]"),
        };
        let text = format!(
            "GET {} HTTP/1.0\r\nHost: {host}\r\nUser-Agent: quorate\r\nConnection: close\r\n\r\n",
            http.path
        );
        stream.write_all(text.as_bytes()).await?;
        let mut head = [0; 12]; // `HTTP/1.x NNN`
        stream.read_exact(&mut head).await?;
        Ok::<_, std::io::Error>(head)
    };
    let Ok(head) = request.await else {
        return false;
    };
    let status = std::str::from_utf8(&head).ok();
    let status = status.and_then(|head| head.strip_prefix("HTTP/1.")?.get(2..5)?.parse().ok());
    status.is_some_and(|status: u16| (200..400).contains(&status))
}

/// Where the search in a growing log stands.
struct SerialSearch {
    at: u64,
    /// The end of what was read, in case the text is cut.
    carry: Vec<u8>,
}

impl SerialSearch {
    /// QEMU appends: what earlier processes wrote is before `begins`.
    fn new(begins: u64) -> Self {
        Self {
            at: begins,
            carry: Vec::new(),
        }
    }

    /// Searches what has been added.
    fn find(&mut self, log: &Path, text: &[u8]) -> bool {
        if text.is_empty() || text.len() > TEXT_MAX {
            return text.is_empty();
        }
        self.try_find(log, text).unwrap_or(false)
    }

    fn try_find(&mut self, log: &Path, text: &[u8]) -> std::io::Result<bool> {
        let mut file = std::fs::File::open(log)?;
        let length = file.metadata()?.len();
        if length < self.at {
            // It was cut, since it had grown too long.
            self.at = 0;
            self.carry.clear();
        }
        while self.at < length {
            file.seek(SeekFrom::Start(self.at))?;
            let read = file
                .by_ref()
                .take(PIECE_BYTES)
                .read_to_end(&mut self.carry)?;
            if read == 0 {
                break;
            }
            self.at += read as u64;
            if self.carry.windows(text.len()).any(|window| window == text) {
                return Ok(true);
            }
            let keep = self.carry.len().saturating_sub(text.len() - 1);
            self.carry.drain(..keep);
        }
        Ok(false)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write as _;

    #[test]
    fn a_text_is_found_across_pieces_but_not_from_before_the_start() {
        let mut file = tempfile::NamedTempFile::new().unwrap();
        let path = file.path().to_owned();
        file.write_all(b"login: of an earlier start").unwrap();
        let mut search = SerialSearch::new(25);
        file.write_all(b"booting... log").unwrap();
        assert!(!search.find(&path, b"login:"));
        file.write_all(b"in: ").unwrap();
        assert!(search.find(&path, b"login:"));
        file.as_file().set_len(0).unwrap();
        assert!(!search.find(&path, b"login:"), "cut meanwhile");
    }

    #[tokio::test]
    async fn http_answers_from_200_to_399_are_ready() {
        for (answer, ready) in [
            ("HTTP/1.1 200 OK\r\n\r\n", true),
            ("HTTP/1.0 302 Found\r\n\r\n", true),
            ("HTTP/1.1 503 No\r\n\r\n", false),
            ("SSH-2.0-OpenSSH\r\n", false),
            ("", false),
        ] {
            let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
            let address = listener.local_addr().unwrap();
            tokio::spawn(async move {
                let (mut stream, _) = listener.accept().await.unwrap();
                let mut buffer = [0; 512];
                let _ = stream.read(&mut buffer).await;
                let _ = stream.write_all(answer.as_bytes()).await;
            });
            let probe = HttpProbe {
                address: address.ip(),
                port: address.port(),
                path: "/".into(),
            };
            assert_eq!(get(&probe).await, ready, "{answer:?}");
        }
    }
}
