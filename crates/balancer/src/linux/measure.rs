//! Programs run by hand, without any interface: for tests, and to measure what they cost.

use std::sync::PoisonError;

use aya::programs::{Program, Xdp};
use aya::{TestRun as _, TestRunAttrs, TestRunOptions};

use super::LinuxDatapath;
use super::object::{MEASURING, chain, kernel};
use crate::BalancerError;
use crate::abi;

/// What a program made of a frame.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Verdict {
    /// What the program returned.
    pub code: u32,
    /// The frame afterwards.
    pub frame: Vec<u8>,
    /// Mean time of a run in nanoseconds.
    pub ns: u32,
}

/// How a program is run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct How {
    /// Where the frame is taken to be: for tcx programs and live frames.
    pub ifindex: u32,
    /// How often.
    pub repeat: u32,
    /// XDP only: every frame goes its way as if it had come in at the interface, and the verdict is not told.
    pub live: bool,
}

impl LinuxDatapath {
    /// Runs a program on a frame, `repeat` times. `ifindex` is where a tcx program takes the frame to be; XDP programs
    /// run at the loopback interface.
    ///
    /// # Errors
    /// When there is no such program or the kernel refuses.
    pub fn test_run(
        &self,
        program: &'static str,
        frame: &[u8],
        ifindex: u32,
        repeat: u32,
    ) -> Result<Verdict, BalancerError> {
        let how = How {
            ifindex,
            repeat,
            live: false,
        };
        self.run_program(program, frame, how)
    }

    /// What the programs `measure` and `calibrate` make of every frame: this one, with the addresses of `services`
    /// services in turn, counted from `first` (the last four octets as a number), or unchanged for none. `verdict` is
    /// what `calibrate` returns.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn series(
        &self,
        frame: &[u8],
        first: u32,
        services: u32,
        verdict: u32,
    ) -> Result<(), BalancerError> {
        let mut host = self.host.lock().unwrap_or_else(PoisonError::into_inner);
        let mut series = abi::Series {
            first,
            services,
            number: 0,
            verdict,
            frame: [0; abi::SERIES_FRAME],
        };
        for (to, from) in series.frame.iter_mut().zip(frame) {
            *to = *from;
        }
        let measures = &mut host.tables.measures;
        measures
            .set(0, series, 0)
            .map_err(kernel("writing", "measures"))
    }

    /// Runs a program on a frame.
    ///
    /// # Errors
    /// When there is no such program or the kernel refuses.
    pub fn run_program(
        &self,
        program: &'static str,
        frame: &[u8],
        how: How,
    ) -> Result<Verdict, BalancerError> {
        let mut host = self.host.lock().unwrap_or_else(PoisonError::into_inner);
        let mut out = vec![0; frame.len().max(64) + 256];
        let mut options = TestRunOptions::new();
        options.data_in = Some(frame);
        options.repeat = how.repeat;
        // `struct __sk_buff`: all but the interface's index is zero.
        let mut buffer = [0_u8; 192];
        buffer[40..44].copy_from_slice(&how.ifindex.to_ne_bytes());
        // `struct xdp_md`: data_end is the frame's size, ingress_ifindex comes after data_meta.
        let mut live = [0_u8; 24];
        let size = u32::try_from(frame.len()).unwrap_or(u32::MAX);
        live[4..8].copy_from_slice(&size.to_ne_bytes());
        live[12..16].copy_from_slice(&how.ifindex.to_ne_bytes());
        if how.live {
            options.ctx_in = Some(&live);
            options.attrs = TestRunAttrs::new().xdp_live_frames(64);
        } else {
            options.data_out = Some(&mut out);
        }
        let result = match host.ebpf.program_mut(program) {
            Some(Program::Xdp(xdp)) => {
                load_late(program, xdp)?;
                xdp.test_run(options)
            }
            Some(Program::SchedClassifier(classifier)) => {
                options.ctx_in = Some(&buffer);
                classifier.test_run(options)
            }
            _ => {
                return Err(BalancerError::Kernel {
                    operation: "finding",
                    object: program.to_owned(),
                    detail: "no such program".to_owned(),
                });
            }
        };
        let result = result.map_err(|error| BalancerError::Kernel {
            operation: "running",
            object: program.to_owned(),
            detail: chain(&error),
        })?;
        out.truncate(result.data_size_out as usize);
        Ok(Verdict {
            code: result.return_value,
            frame: out,
            ns: u32::try_from(result.duration.as_nanos()).unwrap_or(u32::MAX),
        })
    }
}

/// Those that no host needs are loaded at their first run.
fn load_late(name: &str, program: &mut Xdp) -> Result<(), BalancerError> {
    if MEASURING.contains(&name) && program.fd().is_err() {
        program.load().map_err(kernel("loading", name))?;
    }
    Ok(())
}
