//! One HTTP/2 exchange on one connection, for peers and for joining.

use std::error::Error as _;
use std::io;
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::Bytes;
use http_body_util::{BodyExt as _, Full, Limited};
use hyper::body::Incoming;
use hyper::client::conn::http2::{self, SendRequest};
use hyper::{Request, Response, StatusCode};
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::TcpStream;
use tokio_rustls::client::TlsStream;

use crate::cert::CertInfo;
use crate::tls::{self, Slot};
use crate::wire::{Fault, FaultKind, MAX_BODY};

const STREAM_WINDOW: u32 = 1 << 20;
const CONNECTION_WINDOW: u32 = 8 << 20;
/// Reaps connections that nobody calls on any more. The prober of each link is much faster.
const KEEPALIVE: Duration = Duration::from_secs(10);
const KEEPALIVE_TIMEOUT: Duration = Duration::from_secs(5);

/// An answer of the other side.
#[derive(Debug)]
pub(crate) enum Reply {
    Ok(Bytes),
    Fault(Fault),
}

/// Why there is no answer.
#[derive(Debug)]
pub(crate) enum Lost {
    /// The request was not sent at all: it can be sent again elsewhere.
    Unsent(String),
    /// The connection broke while the request was under way.
    Broken(String),
    /// Only this request was given up by the server; the connection is sound.
    Reset(String),
    /// The answer is larger than [`MAX_BODY`].
    TooLarge,
}

pub(crate) type Sender = SendRequest<Full<Bytes>>;

/// Starts HTTP/2 on a TLS connection. The second part drives it and must be spawned.
pub(crate) async fn start(
    stream: Tap,
) -> hyper::Result<(
    Sender,
    http2::Connection<TokioIo<Tap>, Full<Bytes>, TokioExecutor>,
)> {
    http2::Builder::new(TokioExecutor::new())
        .timer(TokioTimer::new())
        .initial_stream_window_size(STREAM_WINDOW)
        .initial_connection_window_size(CONNECTION_WINDOW)
        .keep_alive_interval(KEEPALIVE)
        .keep_alive_timeout(KEEPALIVE_TIMEOUT)
        .keep_alive_while_idle(true)
        .handshake(TokioIo::new(stream))
        .await
}

/// Sends a request and reads the whole answer.
pub(crate) async fn exchange(
    send: &mut Sender,
    request: Request<Full<Bytes>>,
) -> Result<Reply, Lost> {
    let response = match send.try_send_request(request).await {
        Ok(response) => response,
        Err(mut error) => {
            let unsent = error.take_message().is_some();
            let error = error.into_error();
            return Err(if unsent {
                Lost::Unsent(show(&error))
            } else {
                lost(&error)
            });
        }
    };
    read_reply(response).await
}

async fn read_reply(response: Response<Incoming>) -> Result<Reply, Lost> {
    let status = response.status();
    let body = match Limited::new(response.into_body(), MAX_BODY).collect().await {
        Ok(body) => body.to_bytes(),
        Err(error) => {
            return Err(match error.downcast::<hyper::Error>() {
                Ok(error) => lost(&error),
                Err(_) => Lost::TooLarge,
            });
        }
    };
    if status == StatusCode::OK {
        return Ok(Reply::Ok(body));
    }
    let fault = serde_json::from_slice(&body).unwrap_or_else(|_| {
        let text = String::from_utf8_lossy(&body[..body.len().min(200)]).into_owned();
        Fault::new(FaultKind::Refused, status.as_u16(), text)
    });
    Ok(Reply::Fault(fault))
}

fn lost(error: &hyper::Error) -> Lost {
    let reset = error
        .source()
        .and_then(|e| e.downcast_ref::<h2::Error>())
        .is_some_and(|e| e.is_reset() && e.is_remote());
    if reset {
        Lost::Reset(show(error))
    } else {
        Lost::Broken(show(error))
    }
}

/// An error with its sources: hyper's own text alone says little.
fn show(error: &hyper::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(next) = source {
        text = format!("{text}: {next}");
        source = next.source();
    }
    text
}

/// A TLS stream that leaves the typed reason of a failed read in a slot: in TLS 1.3 the server judges the client's certificate
/// after the client's handshake is over, and HTTP/2 keeps nothing of the alert but its text.
pub(crate) struct Tap {
    stream: TlsStream<TcpStream>,
    slot: Slot,
    own: Option<CertInfo>,
}

impl Tap {
    pub(crate) fn new(stream: TlsStream<TcpStream>, slot: Slot, own: Option<CertInfo>) -> Self {
        Self { stream, slot, own }
    }
}

impl AsyncRead for Tap {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let polled = Pin::new(&mut self.stream).poll_read(cx, buf);
        if let Poll::Ready(Err(error)) = &polled
            && let Some(reason) = tls::reason_of(error, &self.slot, self.own.as_ref())
        {
            self.slot.put(reason);
        }
        polled
    }
}

impl AsyncWrite for Tap {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(cx, buf)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write_vectored(cx, bufs)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }
}
