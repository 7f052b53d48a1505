//! Raw Ethernet frames on one interface, through AF_PACKET.
//!
//! A named module with `unsafe`, because the address of a packet socket is a C
//! structure that the library does not know.
#![allow(unsafe_code)]

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::net::addr::{SocketAddrArg, SocketAddrLen, SocketAddrOpaque};
use rustix::net::{AddressFamily, Protocol, RecvFlags, SendFlags, SocketFlags, SocketType};

/// `ETH_P_ALL`: frames of every protocol, in both directions.
const ETH_P_ALL: u16 = 3;

/// The kernel's `struct sockaddr_ll`.
#[repr(C)]
struct SockaddrLl {
    family: u16,
    protocol_be: u16,
    ifindex: i32,
    hatype: u16,
    pkttype: u8,
    halen: u8,
    addr: [u8; 8],
}

// SAFETY: `with_sockaddr` passes a pointer to a whole, initialised `sockaddr_ll` and its
// size, which is what calls that take a `sockaddr` of family AF_PACKET expect.
unsafe impl SocketAddrArg for SockaddrLl {
    unsafe fn with_sockaddr<R>(
        &self,
        f: impl FnOnce(*const SocketAddrOpaque, SocketAddrLen) -> R,
    ) -> R {
        f(
            std::ptr::from_ref(self).cast(),
            size_of::<Self>() as SocketAddrLen,
        )
    }
}

/// A socket that sends and, when opened for it, receives whole frames on one interface.
#[derive(Debug)]
pub struct PacketSocket {
    socket: OwnedFd,
}

impl PacketSocket {
    /// Opens a socket that only sends.
    ///
    /// # Errors
    /// When the kernel refuses; it needs CAP_NET_RAW.
    pub fn sender(ifindex: u32) -> io::Result<Self> {
        Self::open(ifindex, 0)
    }

    /// Opens a socket that also receives every frame the interface sees. It never
    /// blocks: no frame is [`io::ErrorKind::WouldBlock`].
    ///
    /// # Errors
    /// When the kernel refuses; it needs CAP_NET_RAW.
    pub fn capture(ifindex: u32) -> io::Result<Self> {
        Self::open(ifindex, ETH_P_ALL)
    }

    fn open(ifindex: u32, protocol: u16) -> io::Result<Self> {
        let open = Self::unbound()?;
        open.bind(ifindex, protocol)?;
        Ok(open)
    }

    /// A socket that is yet to be told what to listen to.
    pub(super) fn unbound() -> io::Result<Self> {
        // Protocol 0 until it is bound: a frame of another interface never gets in.
        let socket = rustix::net::socket_with(
            AddressFamily::PACKET,
            SocketType::RAW,
            SocketFlags::CLOEXEC | SocketFlags::NONBLOCK,
            None::<Protocol>,
        )?;
        Ok(Self { socket })
    }

    /// Receives every frame that the interface sees from now on.
    pub(super) fn listen(&self, ifindex: u32) -> io::Result<()> {
        self.bind(ifindex, ETH_P_ALL)
    }

    fn bind(&self, ifindex: u32, protocol: u16) -> io::Result<()> {
        let address = SockaddrLl {
            family: AddressFamily::PACKET.as_raw(),
            protocol_be: protocol.to_be(),
            ifindex: i32::try_from(ifindex).map_err(|_| io::ErrorKind::InvalidInput)?,
            hatype: 0,
            pkttype: 0,
            halen: 0,
            addr: [0; 8],
        };
        rustix::net::bind(&self.socket, &address)?;
        Ok(())
    }

    /// Sends one frame.
    ///
    /// # Errors
    /// When the interface is down or its queue is full.
    pub fn send(&self, frame: &[u8]) -> io::Result<()> {
        rustix::net::send(&self.socket, frame, SendFlags::DONTWAIT)?;
        Ok(())
    }

    /// Receives one frame into `buffer` and returns its length.
    ///
    /// # Errors
    /// [`io::ErrorKind::WouldBlock`] when there is none.
    pub fn receive(&self, buffer: &mut [u8]) -> io::Result<usize> {
        let (len, _) = rustix::net::recv(&self.socket, buffer, RecvFlags::DONTWAIT)?;
        Ok(len)
    }
}

impl AsFd for PacketSocket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}
