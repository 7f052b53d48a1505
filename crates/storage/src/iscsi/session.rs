//! A session with a target: login, discovery, and the few SCSI commands that tell what a unit is.
//!
//! ```text
//! connect --security (none | CHAP)--> operational parameters --> full feature: text, SCSI --> logout
//! ```
//! Always holds: one command at a time; one deadline for each call; no password is sent in the clear or kept
//! beyond the login (CHAP, RFC 1994: the target gets a hash over its own challenge). Nothing is written by a session
//! that only looks ([`Session::open`]); one that writes ([`Session::open_as`], [`transfer`]) is for the cluster's own
//! data. QEMU opens the disks of VMs with its own initiator.

mod discover;
mod transfer;

pub use super::pdu::Found;
use super::pdu::{DATA_MAX, Pdu, be32, be64, keys, op, parse_keys};
use crate::Login;
pub use discover::discover;
use md5::{Digest, Md5};
use std::time::Duration;
use tokio::net::TcpStream;
use tokio::time::{Instant, timeout_at};
use transfer::Limits;

/// Units of one target that are looked at.
const LUNS_MAX: usize = 1024;
/// Round trips of one login.
const LOGIN_ROUNDS: usize = 12;
/// Units without a bearing on a command that may come before its answer.
const STRAYS: usize = 64;

/// Why a target cannot be used.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum IscsiError {
    /// Nobody answers there.
    #[error(
        "the portal {portal} does not answer ({detail}): check its address, the cable and the target's service"
    )]
    Portal {
        /// `address:port`.
        portal: String,
        /// What was seen.
        detail: String,
    },
    /// It answers no more.
    #[error("the portal {portal} stopped answering while {during}")]
    Timeout {
        /// `address:port`.
        portal: String,
        /// What was being done.
        during: &'static str,
    },
    /// The password or the account is wrong, or one is needed.
    #[error(
        "{target} refuses the login ({detail}): check `chap.user` and the secret, here and at the target"
    )]
    Authentication {
        /// The target.
        target: String,
        /// What it said.
        detail: String,
    },
    /// The target lets this initiator not in.
    #[error(
        "{target} does not let {initiator} in ({detail}): add this initiator to its access list"
    )]
    Forbidden {
        /// The target.
        target: String,
        /// Who asked.
        initiator: String,
        /// What it said.
        detail: String,
    },
    /// There is no such target, or this initiator may not know of it.
    #[error("{target} is not at this portal, or {initiator} is not on its access list ({detail})")]
    NotFound {
        /// The target.
        target: String,
        /// Who asked.
        initiator: String,
        /// What it said.
        detail: String,
    },
    /// The unit does not exist.
    #[error("{target} has no LUN {lun}")]
    NoLun {
        /// The target.
        target: String,
        /// The number.
        lun: u32,
    },
    /// Anything else.
    #[error("{target}: {detail}")]
    Protocol {
        /// The target.
        target: String,
        /// What was seen.
        detail: String,
    },
}

impl IscsiError {
    /// Whether the same attempt may succeed a little later, once the SAN has been told of this host.
    pub fn may_pass(&self) -> bool {
        matches!(self, Self::Forbidden { .. } | Self::NotFound { .. })
    }
}

/// Who asks whom.
#[derive(Debug, Clone)]
pub struct Peer {
    /// `address:port`.
    pub portal: String,
    /// Name by which this host logs in.
    pub initiator: String,
    /// Account, where the target asks for one.
    pub login: Option<Login>,
    /// Longest time for one call.
    pub deadline: Duration,
}

/// What a unit is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct UnitInfo {
    /// Its number.
    pub lun: u32,
    /// Its size in bytes.
    pub bytes: u64,
    /// Size of its blocks in bytes.
    pub block_bytes: u32,
    /// Who made it, and what it is, as it says.
    pub product: String,
}

/// A logged-in session.
pub struct Session {
    stream: TcpStream,
    peer: Peer,
    target: String,
    task: u32,
    command: u32,
    status: u32,
    until: Instant,
    limits: Limits,
}

impl std::fmt::Debug for Session {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Session")
            .field("target", &self.target)
            .finish_non_exhaustive()
    }
}

impl Session {
    /// Logs in to a target.
    ///
    /// # Errors
    /// [`IscsiError`].
    pub async fn open(peer: &Peer, target: &str) -> Result<Self, IscsiError> {
        Self::login(peer, Some(target), random_isid()).await
    }

    async fn login(peer: &Peer, target: Option<&str>, isid: [u8; 6]) -> Result<Self, IscsiError> {
        let until = Instant::now() + peer.deadline;
        let stream = match timeout_at(until, TcpStream::connect(&peer.portal)).await {
            Ok(Ok(stream)) => stream,
            other => {
                let detail = match other {
                    Ok(Err(error)) => error.to_string(),
                    _ => format!("no answer within {} ms", peer.deadline.as_millis()),
                };
                let portal = peer.portal.clone();
                return Err(IscsiError::Portal { portal, detail });
            }
        };
        // Small exchanges: waiting for more to send costs 40 ms each.
        let _ = stream.set_nodelay(true);
        let mut session = Self {
            stream,
            peer: peer.clone(),
            target: target.unwrap_or("the discovery session").to_owned(),
            task: 1,
            command: 1,
            status: 0,
            until,
            limits: Limits::default(),
        };
        session.log_in(target, isid).await?;
        Ok(session)
    }

    async fn log_in(&mut self, target: Option<&str>, isid: [u8; 6]) -> Result<(), IscsiError> {
        let initiator = self.peer.initiator.clone();
        let mut pairs = vec![
            ("InitiatorName".to_owned(), initiator),
            (
                "SessionType".to_owned(),
                if target.is_some() {
                    "Normal"
                } else {
                    "Discovery"
                }
                .to_owned(),
            ),
        ];
        if let Some(target) = target {
            pairs.push(("TargetName".to_owned(), target.to_owned()));
        }
        let method = match self.peer.login {
            Some(_) => "CHAP,None",
            None => "None",
        };
        pairs.push(("AuthMethod".to_owned(), method.to_owned()));
        let mut stage = Stage::Security {
            transit: self.peer.login.is_none(),
        };
        for _ in 0..LOGIN_ROUNDS {
            let answer = self.login_round(isid, &stage, &pairs).await?;
            self.login_status(&answer)?;
            let given = parse_keys(&answer.data);
            self.limits.learn(&given);
            let transit = answer.flags() & 0x80 != 0;
            (stage, pairs) = match stage {
                Stage::Security { .. } if transit => {
                    (Stage::Operational, operational(target.is_some()))
                }
                Stage::Security { .. } => self.authenticate(&given)?,
                Stage::Operational if transit => return Ok(()),
                // It wants to say more: an empty request asks for it.
                Stage::Operational => (Stage::Operational, Vec::new()),
            };
        }
        Err(self.protocol("the login does not come to an end"))
    }

    async fn login_round(
        &mut self,
        isid: [u8; 6],
        stage: &Stage,
        pairs: &[(String, String)],
    ) -> Result<Pdu, IscsiError> {
        let flags = match stage {
            Stage::Security { transit: false } => 0,
            Stage::Security { transit: true } => 0x80 | 1,
            Stage::Operational => 0x80 | (1 << 2) | 3,
        };
        let mut request = Pdu::new(op::LOGIN | op::IMMEDIATE, flags);
        request.set(8, &isid);
        let pairs: Vec<_> = pairs
            .iter()
            .map(|(k, v)| (k.as_str(), v.as_str()))
            .collect();
        request.data = keys(&pairs);
        let answer = self.exchange(request, "logging in").await?;
        if answer.opcode() != op::LOGIN_RESPONSE {
            return Err(self.unexpected(&answer));
        }
        Ok(answer)
    }

    /// Class and detail of a login response (RFC 7143, section 11.13.5).
    fn login_status(&self, answer: &Pdu) -> Result<(), IscsiError> {
        let (class, detail) = (answer.header[36], answer.header[37]);
        let (target, initiator) = (self.target.clone(), self.peer.initiator.clone());
        let code = format!("status {class:#04x}{detail:02x}");
        match (class, detail) {
            (0, _) => Ok(()),
            (2, 1) => Err(IscsiError::Authentication {
                target,
                detail: code,
            }),
            (2, 2) => Err(IscsiError::Forbidden {
                target,
                initiator,
                detail: code,
            }),
            (2, 3 | 4) => Err(IscsiError::NotFound {
                target,
                initiator,
                detail: code,
            }),
            (1, _) => {
                Err(self.protocol("it sends us to another portal: name that one in `portals`"))
            }
            _ => Err(self.protocol(&format!("the login was refused ({code})"))),
        }
    }

    /// The next step of the security stage, from what the target gave.
    fn authenticate(
        &self,
        given: &[(String, String)],
    ) -> Result<(Stage, Vec<(String, String)>), IscsiError> {
        let get = |key: &str| {
            given
                .iter()
                .find(|(k, _)| k == key)
                .map(|(_, v)| v.as_str())
        };
        let stay = Stage::Security { transit: false };
        let go = Stage::Security { transit: true };
        let pair = |key: &str, value: String| (key.to_owned(), value);
        let Some(login) = &self.peer.login else {
            return Ok((go, Vec::new()));
        };
        if let (Some(id), Some(challenge)) = (get("CHAP_I"), get("CHAP_C")) {
            let id = id.parse::<u8>().ok();
            let challenge = binary(challenge);
            let (Some(id), Some(challenge)) = (id, challenge) else {
                return Err(self.protocol("its CHAP challenge cannot be read"));
            };
            let response = chap(id, login.password.as_bytes(), &challenge);
            let pairs = vec![pair("CHAP_N", login.user.clone()), pair("CHAP_R", response)];
            return Ok((go, pairs));
        }
        match get("AuthMethod") {
            Some("CHAP") => Ok((stay, vec![pair("CHAP_A", "5".to_owned())])),
            Some("None") | None => Ok((go, Vec::new())),
            Some(other) => {
                Err(self.protocol(&format!("it asks for {other}, which is not known here")))
            }
        }
    }

    /// Numbers of the target's units (SPC: REPORT LUNS).
    ///
    /// # Errors
    /// [`IscsiError`].
    pub async fn luns(&mut self) -> Result<Vec<u32>, IscsiError> {
        let room = u32::try_from(8 + 8 * LUNS_MAX).unwrap_or(u32::MAX);
        let mut cdb = [0; 16];
        cdb[0] = 0xa0;
        cdb[6..10].copy_from_slice(&room.to_be_bytes());
        let data = self.command(0, cdb, room).await?.unwrap_or_default();
        let length = be32(&data, 0).unwrap_or(0) as usize;
        let entries = data.get(8..).unwrap_or(&[]).chunks_exact(8);
        let number = |entry: &[u8]| u32::from(entry[0] & 0x3f) << 8 | u32::from(entry[1]);
        Ok(entries.take(length / 8).map(number).collect())
    }

    /// What a unit is; `None`: not a disk.
    ///
    /// # Errors
    /// [`IscsiError::NoLun`] and others.
    pub async fn unit(&mut self, lun: u32) -> Result<Option<UnitInfo>, IscsiError> {
        let target = self.target.clone();
        let mut cdb = [0; 16];
        cdb[0] = 0x12;
        cdb[4] = 64;
        let inquiry = self.command(lun, cdb, 64).await?.unwrap_or_default();
        match inquiry.first().copied() {
            Some(0) => {}
            // Qualifier 3: there is nothing; 1: nothing now.
            Some(kind) if kind & 0xe0 != 0 => return Err(IscsiError::NoLun { target, lun }),
            None => return Err(IscsiError::NoLun { target, lun }),
            Some(_) => return Ok(None),
        }
        let product = inquiry.get(8..32).unwrap_or(&[]);
        let mut cdb = [0; 16];
        // SERVICE ACTION IN (16), READ CAPACITY (16).
        (cdb[0], cdb[1], cdb[13]) = (0x9e, 0x10, 32);
        let mut capacity = self.command(lun, cdb, 32).await?;
        if capacity.is_none() {
            // A unit attention (it was reset, it has grown) is told once.
            capacity = self.command(lun, cdb, 32).await?;
        }
        let capacity = capacity.unwrap_or_default();
        let (Some(last), Some(block_bytes)) = (be64(&capacity, 0), be32(&capacity, 8)) else {
            return Err(self.protocol(&format!("LUN {lun} does not tell its size")));
        };
        Ok(Some(UnitInfo {
            lun,
            bytes: last
                .saturating_add(1)
                .saturating_mul(u64::from(block_bytes)),
            block_bytes,
            product: words(product),
        }))
    }

    /// Reads blocks from a unit, at most 64 KiB.
    ///
    /// # Errors
    /// [`IscsiError`].
    pub async fn read(
        &mut self,
        lun: u32,
        block: u64,
        count: u16,
        block_bytes: u32,
    ) -> Result<Vec<u8>, IscsiError> {
        let mut cdb = [0; 16];
        cdb[0] = 0x88;
        cdb[2..10].copy_from_slice(&block.to_be_bytes());
        cdb[10..14].copy_from_slice(&u32::from(count).to_be_bytes());
        let expect = u32::from(count).saturating_mul(block_bytes).min(1 << 16);
        let mut data = self.command(lun, cdb, expect).await?;
        if data.is_none() {
            data = self.command(lun, cdb, expect).await?;
        }
        data.ok_or_else(|| self.protocol(&format!("LUN {lun} cannot be read")))
    }

    /// One SCSI command with data to us; `None`: it was not carried out (CHECK CONDITION and the like).
    async fn command(
        &mut self,
        lun: u32,
        cdb: [u8; 16],
        expect: u32,
    ) -> Result<Option<Vec<u8>>, IscsiError> {
        self.until = Instant::now() + self.peer.deadline;
        let mut request = Pdu::new(op::SCSI_COMMAND, 0x80 | 0x40 | 1);
        request.set(8, &lun_field(lun));
        request.set_u32(20, expect);
        request.set(32, &cdb);
        self.send(&mut request, "asking a unit").await?;
        self.command = self.command.wrapping_add(1);
        let mut data = vec![0; expect as usize];
        let mut filled = 0;
        for _ in 0..expect as usize / 512 + STRAYS {
            let answer = self.receive("asking a unit").await?;
            match answer.opcode() {
                op::DATA_IN => {
                    let at = answer.u32(40) as usize;
                    let end = at.saturating_add(answer.data.len());
                    if let Some(place) = data.get_mut(at..end) {
                        place.copy_from_slice(&answer.data);
                        filled = filled.max(end);
                    }
                    // With the S bit the status comes along.
                    if answer.flags() & 1 != 0 {
                        data.truncate(filled);
                        return Ok((answer.header[3] == 0).then_some(data));
                    }
                }
                op::SCSI_RESPONSE => {
                    data.truncate(filled);
                    let good = answer.header[2] == 0 && answer.header[3] == 0;
                    return Ok(good.then_some(data));
                }
                op::NOP_IN | op::ASYNC => self.stray(&answer).await?,
                _ => return Err(self.unexpected(&answer)),
            }
        }
        Err(self.protocol("it sends more than was asked for"))
    }

    /// A ping of the target is answered; other news is of no use here.
    async fn stray(&mut self, unit: &Pdu) -> Result<(), IscsiError> {
        if unit.opcode() == op::NOP_IN && unit.u32(20) != u32::MAX {
            let mut pong = Pdu::new(op::NOP_OUT | op::IMMEDIATE, 0x80);
            pong.set_u32(16, u32::MAX);
            pong.set_u32(20, unit.u32(20));
            self.send_numbered(&mut pong, "answering a ping").await?;
        }
        Ok(())
    }

    async fn exchange(
        &mut self,
        mut request: Pdu,
        during: &'static str,
    ) -> Result<Pdu, IscsiError> {
        self.send(&mut request, during).await?;
        for _ in 0..STRAYS {
            let answer = self.receive(during).await?;
            match answer.opcode() {
                op::NOP_IN | op::ASYNC => self.stray(&answer).await?,
                _ => return Ok(answer),
            }
        }
        Err(self.protocol("it does not answer what it was asked"))
    }

    async fn send(&mut self, request: &mut Pdu, during: &'static str) -> Result<(), IscsiError> {
        request.set_u32(16, self.task);
        // One task's login requests share its tag.
        if request.opcode() != op::LOGIN {
            self.task = self.task.wrapping_add(1);
        }
        self.send_numbered(request, during).await
    }

    async fn send_numbered(
        &mut self,
        request: &mut Pdu,
        during: &'static str,
    ) -> Result<(), IscsiError> {
        request.set_u32(24, self.command);
        request.set_u32(28, self.status);
        let sent = timeout_at(self.until, request.write(&mut self.stream)).await;
        self.io(sent, during)
    }

    async fn receive(&mut self, during: &'static str) -> Result<Pdu, IscsiError> {
        let got = timeout_at(self.until, Pdu::read(&mut self.stream)).await;
        let unit = self.io(got, during)?;
        // Those that only carry the number, without using it up.
        let carries = match unit.opcode() {
            op::DATA_IN => unit.flags() & 1 == 0,
            op::R2T => true,
            op::NOP_IN => unit.u32(16) == u32::MAX,
            _ => false,
        };
        if !carries {
            self.status = unit.u32(24).wrapping_add(1);
        }
        Ok(unit)
    }

    fn io<T>(
        &self,
        done: Result<std::io::Result<T>, tokio::time::error::Elapsed>,
        during: &'static str,
    ) -> Result<T, IscsiError> {
        match done {
            Ok(Ok(done)) => Ok(done),
            Ok(Err(error)) => {
                Err(self.protocol(&format!("the connection broke while {during}: {error}")))
            }
            Err(_) => Err(IscsiError::Timeout {
                portal: self.peer.portal.clone(),
                during,
            }),
        }
    }

    fn protocol(&self, detail: &str) -> IscsiError {
        IscsiError::Protocol {
            target: self.target.clone(),
            detail: detail.to_owned(),
        }
    }

    fn unexpected(&self, unit: &Pdu) -> IscsiError {
        match unit.opcode() {
            op::REJECT => self.protocol(&format!(
                "it rejected a request (reason {:#04x})",
                unit.header[2]
            )),
            code => self.protocol(&format!("it sent an unexpected unit ({code:#04x})")),
        }
    }

    /// Ends the session politely, so that the target keeps no dead one.
    pub async fn logout(mut self) {
        self.until = Instant::now() + self.peer.deadline.min(Duration::from_millis(500));
        let request = Pdu::new(op::LOGOUT | op::IMMEDIATE, 0x80);
        // The connection is closed in any case.
        let _ = self.exchange(request, "logging out").await;
    }
}

/// The first two bytes of a unit's number; flat space addressing above 255.
fn lun_field(lun: u32) -> [u8; 2] {
    let number = lun.to_be_bytes();
    match lun > 255 {
        true => [0x40 | (number[2] & 0x3f), number[3]],
        false => [0, number[3]],
    }
}

enum Stage {
    Security { transit: bool },
    Operational,
}

fn operational(normal: bool) -> Vec<(String, String)> {
    let mut pairs = vec![
        ("HeaderDigest", "None".to_owned()),
        ("DataDigest", "None".to_owned()),
        ("MaxRecvDataSegmentLength", DATA_MAX.to_string()),
        ("DefaultTime2Wait", "2".to_owned()),
        ("DefaultTime2Retain", "0".to_owned()),
    ];
    if normal {
        pairs.extend([
            ("ErrorRecoveryLevel", "0".to_owned()),
            ("MaxConnections", "1".to_owned()),
            ("ImmediateData", "Yes".to_owned()),
            ("InitialR2T", "Yes".to_owned()),
            ("MaxOutstandingR2T", "1".to_owned()),
            ("MaxBurstLength", "262144".to_owned()),
            ("FirstBurstLength", "65536".to_owned()),
        ]);
    }
    pairs
        .into_iter()
        .map(|(key, value)| (key.to_owned(), value))
        .collect()
}

/// A session of its own: an identifier that another one has would end that one (RFC 7143, section 6.3.5).
fn random_isid() -> [u8; 6] {
    let mut random = [0; 5];
    // Without randomness the clock is good enough: it only must differ from other sessions of this host.
    if rustix::rand::getrandom(&mut random, rustix::rand::GetRandomFlags::empty()).is_err() {
        let now = std::time::UNIX_EPOCH
            .elapsed()
            .map_or(0, |age| age.subsec_nanos());
        random[..4].copy_from_slice(&now.to_be_bytes());
    }
    let [a, b, c, d, e] = random;
    [0x80, a, b, c, d, e]
}

/// The response to a challenge (RFC 1994): a hash over identifier, secret and challenge.
fn chap(id: u8, secret: &[u8], challenge: &[u8]) -> String {
    let mut hash = Md5::new();
    hash.update([id]);
    hash.update(secret);
    hash.update(challenge);
    let digest = hash.finalize();
    let hex: String = digest.iter().map(|byte| format!("{byte:02x}")).collect();
    format!("0x{hex}")
}

/// A binary value in hexadecimal (`0x...`) or base 64 (`0b...`) (RFC 7143, section 6.1).
fn binary(text: &str) -> Option<Vec<u8>> {
    let (kind, digits) = text.split_at_checked(2)?;
    match kind {
        "0x" | "0X" => {
            let digits = digits.as_bytes();
            let pair = |pair: &[u8]| u8::from_str_radix(std::str::from_utf8(pair).ok()?, 16).ok();
            let odd = digits.len() % 2;
            let head = (odd == 1).then(|| pair(digits.get(..1)?));
            let rest = digits.get(odd..)?.chunks(2).map(pair);
            head.into_iter().chain(rest).collect()
        }
        "0b" | "0B" => {
            use base64::Engine as _;
            base64::engine::general_purpose::STANDARD
                .decode(digits)
                .ok()
        }
        _ => None,
    }
}

/// Fixed-width text as words.
fn words(bytes: &[u8]) -> String {
    let text: String = bytes
        .iter()
        .map(|byte| {
            if byte.is_ascii_graphic() {
                char::from(*byte)
            } else {
                ' '
            }
        })
        .collect();
    text.split_whitespace().collect::<Vec<_>>().join(" ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn chap_answers_are_those_of_the_rfc() {
        // MD5 over 0x01, "secret", 0x00 0x01.
        let mut hash = Md5::new();
        hash.update(b"\x01secret\x00\x01");
        let want: String = hash.finalize().iter().map(|b| format!("{b:02x}")).collect();
        assert_eq!(chap(1, b"secret", &[0, 1]), format!("0x{want}"));
    }

    #[test]
    fn binary_values_of_both_kinds() {
        assert_eq!(binary("0x0aFf"), Some(vec![0x0a, 0xff]));
        assert_eq!(binary("0xaff"), Some(vec![0x0a, 0xff]));
        assert_eq!(binary("0bCv8="), Some(vec![0x0a, 0xff]));
        for bad in ["", "0", "0x0g", "1234", "0b!"] {
            assert_eq!(binary(bad), None, "{bad}");
        }
    }
}
