//! What a guest that was taken over would send, and its host's guards have to keep from the wire: frames from another
//! MAC and IP address, answers of a DHCP server, announcements of an IPv6 router.

use crate::console::say;
use rustix::net::{AddressFamily, SendFlags, SocketType, ipproto, sendto, socket};
use std::io;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddrV6, UdpSocket};
use std::process::Command;
use std::time::Duration;

/// The MAC address that it pretends to have.
const OTHER_MAC: &str = "02:0b:ad:00:00:01";
/// Each is sent so often.
const TIMES: u32 = 3;
/// A router advertisement: life time 1800 s, no options.
const ADVERTISEMENT: [u8; 16] = [134, 0, 0, 0, 64, 0, 7, 8, 0, 0, 0, 0, 0, 0, 0, 0];

/// Sends all of it; `own` is the guest's address with its prefix length, `other` one that is not its own.
pub(crate) fn misbehave(own: &str, other: &str) {
    for _ in 0..TIMES {
        for (what, done) in [
            ("another's IP address", as_another(own, other)),
            ("a DHCP server", from_port(own, 67)),
            ("a router", advertise()),
            ("another's MAC address", with_another_mac(own)),
        ] {
            if let Err(error) = done {
                say(&format!("guest: cannot pretend to be {what}: {error}"));
            }
        }
        std::thread::sleep(Duration::from_millis(50));
    }
}

/// Everybody in the subnet, which is a /24.
fn everybody(own: &str) -> io::Result<Ipv4Addr> {
    let address = own.split('/').next().and_then(|text| text.parse().ok());
    let address: Ipv4Addr = address.ok_or(io::ErrorKind::InvalidInput)?;
    let [a, b, c, _] = address.octets();
    Ok(Ipv4Addr::new(a, b, c, 255))
}

fn shout(socket: &UdpSocket, own: &str, port: u16) -> io::Result<()> {
    socket.set_broadcast(true)?;
    socket.send_to(&[2; 300], (everybody(own)?, port)).map(drop)
}

fn from_port(own: &str, port: u16) -> io::Result<()> {
    shout(&UdpSocket::bind(("0.0.0.0", port))?, own, 68)
}

fn as_another(own: &str, other: &str) -> io::Result<()> {
    ip(&["addr", "add", &format!("{other}/24"), "dev", "eth0"])?;
    let sent = UdpSocket::bind((other, 0)).and_then(|socket| shout(&socket, own, 9));
    ip(&["addr", "del", &format!("{other}/24"), "dev", "eth0"])?;
    sent
}

fn with_another_mac(own: &str) -> io::Result<()> {
    let mac = std::fs::read_to_string("/sys/class/net/eth0/address")?;
    ip(&["link", "set", "eth0", "address", OTHER_MAC])?;
    let sent = from_port(own, 9);
    ip(&["link", "set", "eth0", "address", mac.trim()])?;
    sent
}

fn advertise() -> io::Result<()> {
    let index = std::fs::read_to_string("/sys/class/net/eth0/ifindex")?;
    let index = index
        .trim()
        .parse()
        .map_err(|_| io::ErrorKind::InvalidData)?;
    let raw = socket(AddressFamily::INET6, SocketType::RAW, Some(ipproto::ICMPV6))?;
    let all = Ipv6Addr::new(0xff02, 0, 0, 0, 0, 0, 0, 1);
    let to = SocketAddrV6::new(all, 0, 0, index);
    sendto(&raw, &ADVERTISEMENT, SendFlags::empty(), &to)?;
    Ok(())
}

fn ip(arguments: &[&str]) -> io::Result<()> {
    let mut command = Command::new("/bin/busybox");
    let output = command.arg("ip").args(arguments).output()?;
    match output.status.success() {
        true => Ok(()),
        false => Err(io::Error::other(
            String::from_utf8_lossy(&output.stderr).trim().to_owned(),
        )),
    }
}
