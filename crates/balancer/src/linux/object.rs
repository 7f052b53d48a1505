//! The object: loaded into the kernel, its maps pinned or taken over from an earlier process.
//!
//! Always holds: maps of the same ABI version are taken over with what is in them, whoever made them; maps of another
//! version are left to the links that still use them, and removed once no link does.

use std::error::Error;
use std::path::{Path, PathBuf};

use aya::maps::{Array, ArrayOfMaps, HashMap, Map, MapData, PerCpuArray, PerCpuHashMap};
use aya::programs::{ProgramError, SchedClassifier, Xdp};
use aya::{Ebpf, EbpfError, EbpfLoader};

use super::doors::{self, Doors};
use crate::BalancerError;
use crate::abi;

/// The programs, built by `bpf/build.sh`; aligned as the loader wants it.
static OBJECT: &[u8] = aya::include_bytes_aligned!("../../bpf/quorate.bpf.o");

/// Magic number of the BPF file system.
const BPFFS: u64 = 0xcafe_4a11;
/// So much of the verifier's account is kept: its end says what is wrong.
const LOG_BYTES: usize = 4000;

/// Loaded when they are asked for only.
pub(super) const MEASURING: [&str; 3] = ["measure", "calibrate", "memory"];

/// Entries of the tables. Those of flows, pins and clients are memory: about 100 bytes each.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Capacity {
    /// Services, and rings.
    pub services: u32,
    /// Service addresses of each family.
    pub addresses: u32,
    /// VMs that are members of any ring.
    pub members: u32,
    /// Taps.
    pub edges: u32,
    /// Flows known to all edges: the oldest are forgotten.
    pub flows: u32,
    /// Pinned flows.
    pub pins: u32,
    /// Clients remembered by services with an affinity time.
    pub clients: u32,
}

impl Default for Capacity {
    fn default() -> Self {
        Self {
            services: 2048,
            addresses: 2048,
            members: 4096,
            edges: 1024,
            flows: 65_536,
            pins: 65_536,
            clients: 16_384,
        }
    }
}

/// The typed maps.
pub(super) struct Tables {
    pub(super) measures: Array<MapData, abi::Series>,
    pub(super) settings: Array<MapData, abi::Config>,
    pub(super) cpus: PerCpuArray<MapData, abi::Cpu>,
    pub(super) vips4: HashMap<MapData, abi::Vip4Key, abi::Vip>,
    pub(super) vips6: HashMap<MapData, abi::Vip6Key, abi::Vip>,
    pub(super) services: Array<MapData, abi::Service>,
    pub(super) counts: PerCpuArray<MapData, abi::ServiceCounts>,
    pub(super) members: Array<MapData, abi::Member>,
    pub(super) edges: HashMap<MapData, u32, abi::Edge>,
    pub(super) flows: HashMap<MapData, abi::FlowKey, abi::Flow>,
    pub(super) pins: HashMap<MapData, abi::PinKey, abi::Pin>,
    pub(super) pairs: PerCpuHashMap<MapData, abi::PairKey, abi::PairCount>,
    pub(super) limits: Array<MapData, abi::Limit>,
    pub(super) paces: HashMap<MapData, abi::PairKey, abi::Pace>,
    pub(super) offences: HashMap<MapData, u32, abi::Offence>,
    pub(super) rings: ArrayOfMaps<MapData>,
    pub(super) few_rings: ArrayOfMaps<MapData>,
    /// These once more, to be read whole.
    pub(super) all_flows: MapData,
    pub(super) all_pins: MapData,
    pub(super) duplicates: MapData,
}

/// All that was loaded.
pub(super) struct Loaded {
    pub(super) ebpf: Ebpf,
    pub(super) tables: Tables,
    pub(super) lease: Array<MapData, u64>,
    pub(super) doors: Doors,
    /// Sizes of the tables as they are: those taken over keep theirs.
    pub(super) capacity: Capacity,
}

/// An error with all that caused it, on one line.
pub(super) fn chain(error: &dyn Error) -> String {
    let mut text = error.to_string();
    let mut next = error.source();
    while let Some(source) = next {
        let more = source.to_string();
        if !text.contains(&more) {
            text.push_str(": ");
            text.push_str(&more);
        }
        next = source.source();
    }
    text
}

/// The number of the system call's error somewhere in the chain.
pub(super) fn errno(error: &(dyn Error + 'static)) -> Option<i32> {
    let mut next = Some(error);
    while let Some(one) = next {
        if let Some(io) = one.downcast_ref::<std::io::Error>() {
            return io.raw_os_error();
        }
        next = one.source();
    }
    None
}

/// A failed operation on a map, a link or a file.
pub(super) fn kernel<E: Error + 'static>(
    operation: &'static str,
    object: impl Into<String>,
) -> impl FnOnce(E) -> BalancerError {
    let object = object.into();
    move |error| match errno(&error) {
        Some(libc::EPERM | libc::EACCES) => BalancerError::NotPermitted {
            detail: format!("{operation} of `{object}`: {}", chain(&error)),
        },
        _ => BalancerError::Kernel {
            operation,
            object,
            detail: chain(&error),
        },
    }
}

/// Makes sure that pins can be made below `root`, whose parent is a BPF file system or becomes one.
pub(super) fn ensure_bpffs(root: &Path) -> Result<(), BalancerError> {
    let mount = root.parent().unwrap_or(root);
    let failed = |detail: String| BalancerError::NoBpffs {
        path: mount.display().to_string(),
        detail,
    };
    if !is_bpffs(mount) {
        if !mount.exists() {
            std::fs::create_dir_all(mount).map_err(|error| failed(error.to_string()))?;
        }
        rustix::mount::mount(
            "bpf",
            mount,
            "bpf",
            rustix::mount::MountFlags::NOSUID
                | rustix::mount::MountFlags::NODEV
                | rustix::mount::MountFlags::NOEXEC,
            None,
        )
        .map_err(|error| failed(error.to_string()))?;
    }
    std::fs::create_dir_all(root).map_err(|error| failed(error.to_string()))
}

fn is_bpffs(path: &Path) -> bool {
    let wanted = i64::try_from(BPFFS).unwrap_or(0);
    rustix::fs::statfs(path).is_ok_and(|found| found.f_type == wanted)
}

/// Where the maps of this ABI version are pinned.
pub(super) fn maps_dir(root: &Path) -> PathBuf {
    root.join(format!("maps-{}", abi::ABI_VERSION))
}

/// Loads the programs, with the maps pinned below `root` or made anew there.
pub(super) fn load(root: &Path, capacity: &Capacity) -> Result<Loaded, BalancerError> {
    ensure_bpffs(root)?;
    let maps = maps_dir(root);
    std::fs::create_dir_all(&maps).map_err(kernel("making", maps.display().to_string()))?;
    let mut loader = EbpfLoader::new();
    loader.default_map_pin_directory(&maps);
    let sizes = [
        ("services", capacity.services),
        ("counts", capacity.services.div_ceil(abi::COUNTED)),
        ("rings", capacity.services),
        ("few_rings", capacity.services),
        ("doors", doors::room(capacity.addresses)),
        ("vips4", capacity.addresses),
        ("vips6", capacity.addresses),
        ("members", capacity.members),
        ("edges", capacity.edges),
        ("flows", capacity.flows),
        ("pins", capacity.pins),
        ("clients", capacity.clients),
        ("pairs", capacity.services.saturating_mul(16)),
        ("limits", capacity.services),
        ("paces", capacity.services.saturating_mul(16)),
        ("client_paces", capacity.clients),
        ("offences", capacity.edges),
    ];
    for (name, size) in sizes {
        loader.map_max_entries(name, size);
    }
    let mut ebpf = loader.load(OBJECT).map_err(refused)?;
    load_programs(&mut ebpf)?;
    let tables = tables(&mut ebpf, &maps)?;
    let lease = typed(&mut ebpf, "lease")?;
    let doors = Doors::read_back(typed(&mut ebpf, "doors")?, &again(&maps, "doors")?)?;
    Ok(Loaded {
        ebpf,
        tables,
        lease,
        doors,
        capacity: real_capacity(&maps)?,
    })
}

/// What an earlier process made is as large as it made it.
fn real_capacity(maps: &Path) -> Result<Capacity, BalancerError> {
    let size = |name: &str| {
        let what = || format!("map `{name}`");
        let map = MapData::from_pin(maps.join(name)).map_err(kernel("opening", what()))?;
        let info = map.info().map_err(kernel("reading", what()))?;
        Ok::<u32, BalancerError>(info.max_entries())
    };
    Ok(Capacity {
        services: size("services")?
            .min(size("rings")?)
            .min(size("few_rings")?)
            .min(size("limits")?)
            .min(u32::from(u16::MAX)),
        addresses: size("vips4")?,
        members: size("members")?.min(u32::from(abi::NO_MEMBER)),
        edges: size("edges")?,
        flows: size("flows")?,
        pins: size("pins")?,
        clients: size("clients")?,
    })
}

fn refused(error: EbpfError) -> BalancerError {
    match errno(&error) {
        Some(libc::EPERM | libc::EACCES) => BalancerError::NotPermitted {
            detail: chain(&error),
        },
        Some(libc::ENOSYS | libc::EINVAL) => BalancerError::Unsupported {
            reason: chain(&error),
        },
        _ => BalancerError::Kernel {
            operation: "loading",
            object: "quorate.bpf.o".to_owned(),
            detail: chain(&error),
        },
    }
}

/// What a failed load of one program means.
fn program_refused(program: &str, error: ProgramError) -> BalancerError {
    match error {
        ProgramError::LoadError {
            io_error,
            verifier_log,
        } => {
            let log = verifier_log.to_string();
            match (io_error.raw_os_error(), log.trim().is_empty()) {
                (Some(libc::EPERM), true) => BalancerError::NotPermitted {
                    detail: io_error.to_string(),
                },
                (Some(libc::EINVAL | libc::ENOSYS), true) => BalancerError::Unsupported {
                    reason: format!("program `{program}` cannot be loaded: {io_error}"),
                },
                _ => {
                    let begin = log.len().saturating_sub(LOG_BYTES);
                    let begin = (begin..log.len()).find(|at| log.is_char_boundary(*at));
                    BalancerError::Verifier {
                        program: program.to_owned(),
                        detail: io_error.to_string(),
                        log: log[begin.unwrap_or(0)..].to_owned(),
                    }
                }
            }
        }
        other => BalancerError::Kernel {
            operation: "loading",
            object: program.to_owned(),
            detail: chain(&other),
        },
    }
}

fn load_programs(ebpf: &mut Ebpf) -> Result<(), BalancerError> {
    for (name, program) in ebpf.programs_mut() {
        if MEASURING.contains(&name) {
            continue;
        }
        let result = match program {
            aya::programs::Program::Xdp(xdp) => xdp.load(),
            aya::programs::Program::SchedClassifier(classifier) => classifier.load(),
            _ => continue,
        };
        result.map_err(|error| program_refused(name, error))?;
    }
    Ok(())
}

/// Loads any object's programs, for the test that a refusal keeps the verifier's words.
#[cfg(test)]
pub(super) fn load_bytes(bytes: &[u8]) -> Result<(), BalancerError> {
    let mut ebpf = EbpfLoader::new().load(bytes).map_err(refused)?;
    load_programs(&mut ebpf)
}

fn typed<T>(ebpf: &mut Ebpf, name: &'static str) -> Result<T, BalancerError>
where
    T: TryFrom<Map, Error = aya::maps::MapError>,
{
    let map = ebpf.take_map(name).ok_or_else(|| BalancerError::Kernel {
        operation: "finding",
        object: format!("map `{name}`"),
        detail: "the object does not have it".to_owned(),
    })?;
    T::try_from(map).map_err(kernel("opening", format!("map `{name}`")))
}

/// Another handle of a map.
fn again(maps: &Path, name: &str) -> Result<MapData, BalancerError> {
    MapData::from_pin(maps.join(name)).map_err(kernel("opening", format!("map `{name}`")))
}

fn tables(ebpf: &mut Ebpf, maps: &Path) -> Result<Tables, BalancerError> {
    Ok(Tables {
        measures: typed(ebpf, "measures")?,
        settings: typed(ebpf, "settings")?,
        cpus: typed(ebpf, "cpus")?,
        vips4: typed(ebpf, "vips4")?,
        vips6: typed(ebpf, "vips6")?,
        services: typed(ebpf, "services")?,
        counts: typed(ebpf, "counts")?,
        members: typed(ebpf, "members")?,
        edges: typed(ebpf, "edges")?,
        flows: typed(ebpf, "flows")?,
        pins: typed(ebpf, "pins")?,
        pairs: typed(ebpf, "pairs")?,
        limits: typed(ebpf, "limits")?,
        paces: typed(ebpf, "paces")?,
        offences: typed(ebpf, "offences")?,
        rings: typed(ebpf, "rings")?,
        few_rings: typed(ebpf, "few_rings")?,
        all_flows: again(maps, "flows")?,
        all_pins: again(maps, "pins")?,
        duplicates: again(maps, "duplicates")?,
    })
}

/// A loaded XDP program.
pub(super) fn xdp<'a>(
    ebpf: &'a mut Ebpf,
    name: &'static str,
) -> Result<&'a mut Xdp, BalancerError> {
    let program = ebpf.program_mut(name).ok_or_else(|| missing(name))?;
    program.try_into().map_err(kernel("finding", name))
}

/// A loaded tcx program.
pub(super) fn classifier<'a>(
    ebpf: &'a mut Ebpf,
    name: &'static str,
) -> Result<&'a mut SchedClassifier, BalancerError> {
    let program = ebpf.program_mut(name).ok_or_else(|| missing(name))?;
    program.try_into().map_err(kernel("finding", name))
}

fn missing(name: &str) -> BalancerError {
    BalancerError::Kernel {
        operation: "finding",
        object: format!("program `{name}`"),
        detail: "the object does not have it".to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_refusal_keeps_the_verifier_s_words() {
        if !rustix::process::geteuid().is_root() {
            println!("SKIPPED verifier: needs root");
            return;
        }
        let object = aya::include_bytes_aligned!("../../bpf/refused.bpf.o");
        let error = load_bytes(object).unwrap_err();
        let BalancerError::Verifier { program, log, .. } = &error else {
            panic!("{error}");
        };
        assert_eq!(program, "refused");
        assert!(log.contains("invalid access to packet"), "{log}");
        assert!(error.to_string().contains("invalid access to packet"));
    }
}
