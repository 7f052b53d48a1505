//! Writing to a unit: for the cluster's own data, such as a witness's log.
//!
//! ```text
//! WRITE, with as much data as the target takes at once --R2T--> the piece that it asks for --...--> status
//! ```
//! Always holds: what a session under a fixed identifier wrote has ended before another one under the same identifier
//! begins: the target ends the old session, and what it was asked there, before it answers the new login (RFC 7143, section
//! 6.3.5), and this host keeps nothing unsent for a closed or a stalled connection. Must not: cache or reorder anything.

use super::super::pdu::{Pdu, op};
use super::{IscsiError, Peer, STRAYS, Session, lun_field};
use std::time::Duration;
use tokio::time::{Instant, timeout_at};

/// A target takes at least that much in one piece (RFC 7143, section 13.12).
const SEGMENT: usize = 8192;
/// Most data of one piece that is sent, in bytes.
const SEGMENT_MAX: usize = 256 << 10;
/// Attempts at a command that a unit puts off (it was reset, it is busy).
const ATTEMPTS: usize = 5;
const ATTEMPT_AGAIN: Duration = Duration::from_millis(20);
const WRITING: &str = "writing to a unit";

/// What the target takes, as agreed at the login.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Limits {
    /// Data may come along with a command.
    immediate: bool,
    /// So much of it.
    first_burst: usize,
    /// Longest piece.
    segment: usize,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            immediate: true,
            first_burst: 65_536,
            segment: SEGMENT,
        }
    }
}

impl Limits {
    /// Takes over what the target said.
    pub(super) fn learn(&mut self, given: &[(String, String)]) {
        for (key, value) in given {
            let number = || value.parse::<usize>().ok().filter(|number| *number >= 512);
            match key.as_str() {
                "ImmediateData" => self.immediate = value == "Yes",
                "FirstBurstLength" => self.first_burst = number().unwrap_or(self.first_burst),
                "MaxRecvDataSegmentLength" => {
                    self.segment = number().unwrap_or(self.segment).min(SEGMENT_MAX);
                }
                _ => {}
            }
        }
    }

    fn with_command(&self, bytes: usize) -> usize {
        match self.immediate {
            true => bytes.min(self.first_burst).min(self.segment),
            false => 0,
        }
    }
}

/// How a command ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Ended {
    status: u8,
    sense_key: u8,
}

impl Ended {
    fn of(answer: &Pdu) -> Self {
        // The length of the sense data comes first.
        let sense = answer.data.get(2..).unwrap_or(&[]);
        let at = |index: usize| sense.get(index).copied().unwrap_or(0) & 0x0f;
        let sense_key = match sense.first().copied().unwrap_or(0) & 0x7f {
            0x70 | 0x71 => at(2),
            0x72 | 0x73 => at(1),
            _ => 0,
        };
        let status = match answer.header[2] {
            0 => answer.header[3],
            // It was not carried out at all.
            _ => 0xff,
        };
        Self { status, sense_key }
    }

    fn good(self) -> bool {
        self.status == 0
    }

    /// The same command may do a little later.
    fn put_off(self) -> bool {
        const UNIT_ATTENTION: u8 = 6;
        // CHECK CONDITION; BUSY, TASK SET FULL, TASK ABORTED.
        (self.status == 2 && self.sense_key == UNIT_ATTENTION)
            || matches!(self.status, 0x08 | 0x28 | 0x40)
    }

    fn text(self) -> String {
        match (self.status, self.sense_key) {
            (0x18, _) => "another host has reserved it".to_owned(),
            (2, 3) => "its medium is defective".to_owned(),
            (2, 7) => "it is write-protected".to_owned(),
            (status, key) => format!("status {status:#04x}, sense key {key:#04x}"),
        }
    }
}

impl Session {
    /// Logs in to a target for writing, under an identifier of the caller's: an earlier session of this host under the same one
    /// is ended by the target.
    ///
    /// # Errors
    /// [`IscsiError`].
    pub async fn open_as(peer: &Peer, target: &str, number: u8) -> Result<Self, IscsiError> {
        // The "random" format, as the others: none of theirs begins so but by chance of one in 2^40.
        let isid = [0x80, b'Q', b'W', 0, 0, number];
        let session = Self::login(peer, Some(target), isid).await?;
        let socket = &session.stream;
        // Nothing may be delivered late: unsent data go with the connection, and with a peer that is silent.
        let linger = rustix::net::sockopt::set_socket_linger(socket, Some(Duration::ZERO));
        let patience = u32::try_from(peer.deadline.as_millis()).unwrap_or(u32::MAX);
        let patience = rustix::net::sockopt::set_tcp_user_timeout(socket, patience);
        if let Err(error) = linger.and(patience) {
            return Err(session.protocol(&format!("its connection cannot be set up: {error}")));
        }
        Ok(session)
    }

    /// Writes whole blocks. It is durable after [`Session::synchronize`].
    ///
    /// # Errors
    /// [`IscsiError`]; it may have been written nevertheless, in part too.
    pub async fn write(
        &mut self,
        lun: u32,
        block: u64,
        count: u32,
        data: &[u8],
    ) -> Result<(), IscsiError> {
        let mut cdb = [0; 16];
        // WRITE (16).
        cdb[0] = 0x8a;
        cdb[2..10].copy_from_slice(&block.to_be_bytes());
        cdb[10..14].copy_from_slice(&count.to_be_bytes());
        self.insist(lun, cdb, data, "written").await
    }

    /// Makes what was written durable.
    ///
    /// # Errors
    /// [`IscsiError`].
    pub async fn synchronize(&mut self, lun: u32) -> Result<(), IscsiError> {
        let mut cdb = [0; 16];
        // SYNCHRONIZE CACHE (10), all of it.
        cdb[0] = 0x35;
        self.insist(lun, cdb, &[], "made durable").await
    }

    /// A unit that gave less than it was asked for.
    pub(crate) fn short(&self, lun: u32) -> IscsiError {
        self.protocol(&format!("LUN {lun} gave less than it was asked for"))
    }

    async fn insist(
        &mut self,
        lun: u32,
        cdb: [u8; 16],
        data: &[u8],
        what: &str,
    ) -> Result<(), IscsiError> {
        let mut ended = self.put(lun, cdb, data).await?;
        for _ in 1..ATTEMPTS {
            if !ended.put_off() {
                break;
            }
            tokio::time::sleep(ATTEMPT_AGAIN).await;
            ended = self.put(lun, cdb, data).await?;
        }
        match ended.good() {
            true => Ok(()),
            false => {
                let text = format!("LUN {lun} cannot be {what}: {}", ended.text());
                Err(self.protocol(&text))
            }
        }
    }

    /// One SCSI command with data to the unit, or none.
    async fn put(&mut self, lun: u32, cdb: [u8; 16], data: &[u8]) -> Result<Ended, IscsiError> {
        self.until = Instant::now() + self.peer.deadline;
        let length = u32::try_from(data.len()).map_err(|_| self.protocol("too much data"))?;
        let write = if data.is_empty() { 0 } else { 0x20 };
        let mut request = Pdu::new(op::SCSI_COMMAND, 0x80 | write | 1);
        request.set(8, &lun_field(lun));
        request.set_u32(20, length);
        request.set(32, &cdb);
        let now = self.limits.with_command(data.len());
        request.data = data.get(..now).unwrap_or_default().to_vec();
        let tag = self.task;
        self.send(&mut request, WRITING).await?;
        self.command = self.command.wrapping_add(1);
        for _ in 0..data.len() / 512 + STRAYS {
            let answer = self.receive(WRITING).await?;
            match answer.opcode() {
                op::R2T => self.give(lun, tag, &answer, data).await?,
                op::SCSI_RESPONSE => return Ok(Ended::of(&answer)),
                op::NOP_IN | op::ASYNC => self.stray(&answer).await?,
                _ => return Err(self.unexpected(&answer)),
            }
        }
        Err(self.protocol("it asks for more than there is"))
    }

    /// Gives the piece that the target asks for.
    async fn give(
        &mut self,
        lun: u32,
        tag: u32,
        asked: &Pdu,
        data: &[u8],
    ) -> Result<(), IscsiError> {
        let (from, length) = (asked.u32(40) as usize, asked.u32(44) as usize);
        let end = from.checked_add(length);
        let wanted = end.and_then(|end| data.get(from..end));
        let Some(wanted) = wanted.filter(|wanted| !wanted.is_empty()) else {
            return Err(self.protocol("it asks for data that were not announced"));
        };
        let pieces = wanted.len().div_ceil(self.limits.segment);
        for (number, piece) in wanted.chunks(self.limits.segment).enumerate() {
            let last = if number + 1 == pieces { 0x80 } else { 0 };
            let mut unit = Pdu::new(op::DATA_OUT, last);
            let at = from + number * self.limits.segment;
            let (at, number) = (u32::try_from(at), u32::try_from(number));
            unit.set(8, &lun_field(lun));
            unit.set_u32(16, tag);
            unit.set_u32(20, asked.u32(20));
            unit.set_u32(28, self.status);
            unit.set_u32(36, number.unwrap_or(u32::MAX));
            unit.set_u32(40, at.unwrap_or(u32::MAX));
            unit.data = piece.to_vec();
            let sent = timeout_at(self.until, unit.write(&mut self.stream)).await;
            self.io(sent, WRITING)?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn given(pairs: &[(&str, &str)]) -> Vec<(String, String)> {
        let pairs = pairs.iter();
        pairs
            .map(|(k, v)| ((*k).to_owned(), (*v).to_owned()))
            .collect()
    }

    #[test]
    fn only_so_much_goes_with_a_command_as_was_agreed() {
        let mut limits = Limits::default();
        assert_eq!(limits.with_command(4096), 4096);
        assert_eq!(limits.with_command(1 << 20), SEGMENT);
        limits.learn(&given(&[
            ("MaxRecvDataSegmentLength", "65536"),
            ("FirstBurstLength", "16384"),
        ]));
        assert_eq!(limits.with_command(1 << 20), 16_384);
        limits.learn(&given(&[("MaxRecvDataSegmentLength", "nonsense")]));
        assert_eq!(limits.segment, 65_536);
        limits.learn(&given(&[("MaxRecvDataSegmentLength", "16777215")]));
        assert_eq!(limits.segment, SEGMENT_MAX);
        limits.learn(&given(&[("ImmediateData", "No")]));
        assert_eq!(limits.with_command(4096), 0);
    }

    #[test]
    fn a_unit_that_was_reset_is_asked_again_and_a_reserved_one_is_not() {
        let ended = |status: u8, sense: &[u8]| {
            let mut answer = Pdu::new(op::SCSI_RESPONSE, 0x80);
            answer.header[3] = status;
            answer.data = [&[0, sense.len() as u8], sense].concat();
            Ended::of(&answer)
        };
        assert!(ended(0, &[]).good());
        assert!(ended(2, &[0x70, 0, 6]).put_off());
        assert!(ended(2, &[0x72, 6]).put_off());
        assert!(!ended(2, &[0x70, 0, 5]).put_off());
        assert!(ended(0x28, &[]).put_off());
        let reserved = ended(0x18, &[]);
        assert!(!reserved.good() && !reserved.put_off());
        assert!(reserved.text().contains("reserved"));
        // Its data may be cut short.
        assert!(!ended(2, &[0x70]).put_off());
    }
}
