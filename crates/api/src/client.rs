//! The client of the API, for the command line and tests.
//!
//! One connection per request: the socket is local, and a command makes few requests.

use crate::error::{ApiError, ErrorCode};
use crate::routes::CONSOLE_PROTOCOL;
use crate::view::EventView;
use futures_util::stream::{BoxStream, StreamExt as _};
use http_body_util::{BodyExt as _, Full, Limited};
use hyper::body::{Bytes, Incoming};
use hyper::{Method, Request, Response, StatusCode};
use hyper_util::rt::TokioIo;
use serde::Serialize;
use serde::de::DeserializeOwned;
use std::path::{Path, PathBuf};
use std::time::Duration;
use tokio::net::UnixStream;

/// Largest answer that is read whole.
const MAX_ANSWER: usize = 64 << 20;
/// Longest line of an event stream.
const MAX_LINE: usize = 1 << 20;

/// Why a request has no answer.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// Nobody listens on the socket.
    #[error("the daemon cannot be reached on {path}: {source}")]
    Unreachable {
        /// The socket.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// The connection broke, or no answer came in time.
    #[error("the daemon did not answer: {0}")]
    Broken(String),
    /// The daemon answered that it did not do it.
    #[error(transparent)]
    Refused(#[from] ApiError),
}

/// A client of one daemon.
#[derive(Debug, Clone)]
pub struct Client {
    socket: PathBuf,
    by: String,
    timeout: Duration,
}

impl Client {
    /// A client of the daemon whose socket this is. `by` is written into the audit trail.
    pub fn new(socket: impl Into<PathBuf>, by: impl Into<String>) -> Self {
        Self {
            socket: socket.into(),
            by: by.into(),
            timeout: Duration::from_secs(30),
        }
    }

    /// With another bound for one request.
    #[must_use]
    pub fn timeout(mut self, timeout: Duration) -> Self {
        self.timeout = timeout;
        self
    }

    /// The socket.
    pub fn socket(&self) -> &Path {
        &self.socket
    }

    /// `GET path`.
    pub async fn get<T: DeserializeOwned>(&self, path: &str) -> Result<T, ClientError> {
        self.json(Method::GET, path, None).await
    }

    /// `POST path` with a JSON body.
    pub async fn post<T: DeserializeOwned>(
        &self,
        path: &str,
        body: &impl Serialize,
    ) -> Result<T, ClientError> {
        let body =
            serde_json::to_vec(body).map_err(|error| ClientError::Broken(error.to_string()))?;
        self.json(Method::POST, path, Some(body)).await
    }

    /// `PUT path` with a JSON body.
    pub async fn put<T: DeserializeOwned>(
        &self,
        path: &str,
        body: &impl Serialize,
    ) -> Result<T, ClientError> {
        let body =
            serde_json::to_vec(body).map_err(|error| ClientError::Broken(error.to_string()))?;
        self.json(Method::PUT, path, Some(body)).await
    }

    /// `DELETE path`.
    pub async fn delete<T: DeserializeOwned>(&self, path: &str) -> Result<T, ClientError> {
        self.json(Method::DELETE, path, None).await
    }

    /// `GET path` as text.
    pub async fn text(&self, path: &str) -> Result<String, ClientError> {
        let bytes = self.whole(Method::GET, path, None).await?;
        Ok(String::from_utf8_lossy(&bytes).into_owned())
    }

    async fn json<T: DeserializeOwned>(
        &self,
        method: Method,
        path: &str,
        body: Option<Vec<u8>>,
    ) -> Result<T, ClientError> {
        let bytes = self.whole(method, path, body).await?;
        serde_json::from_slice(&bytes).map_err(|error| {
            ClientError::Broken(format!("its answer to {path} cannot be read ({error}); are daemon and command of one version?"))
        })
    }

    async fn whole(
        &self,
        method: Method,
        path: &str,
        body: Option<Vec<u8>>,
    ) -> Result<Bytes, ClientError> {
        let work = async {
            let response = self.send(method, path, body, None).await?;
            collect(response).await
        };
        match tokio::time::timeout(self.timeout, work).await {
            Ok(result) => result,
            Err(_) => {
                let waited = self.timeout.as_secs();
                Err(ClientError::Broken(format!("no answer within {waited} s")))
            }
        }
    }

    /// Sends and checks the status; the body is left to the caller.
    async fn send(
        &self,
        method: Method,
        path: &str,
        body: Option<Vec<u8>>,
        extra: Option<(&str, &str)>,
    ) -> Result<Response<Incoming>, ClientError> {
        let stream =
            UnixStream::connect(&self.socket)
                .await
                .map_err(|source| ClientError::Unreachable {
                    path: self.socket.clone(),
                    source,
                })?;
        let broken = |error: hyper::Error| ClientError::Broken(error.to_string());
        let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream))
            .await
            .map_err(broken)?;
        tokio::spawn(connection.with_upgrades());
        let mut request = Request::builder()
            .method(method)
            .uri(path)
            .header("host", "localhost")
            .header("x-quorate-by", &self.by);
        if body.is_some() {
            request = request.header("content-type", "application/json");
        }
        if let Some((name, value)) = extra {
            request = request.header(name, value);
        }
        if extra.is_some_and(|(name, _)| name == "upgrade") {
            request = request.header("connection", "upgrade");
        }
        let request = request
            .body(Full::new(Bytes::from(body.unwrap_or_default())))
            .map_err(|error| ClientError::Broken(error.to_string()))?;
        let response = sender.send_request(request).await.map_err(broken)?;
        let status = response.status();
        if status.is_success() || status == StatusCode::SWITCHING_PROTOCOLS {
            return Ok(response);
        }
        let bytes = collect(response).await?;
        Err(refused(status, &bytes).into())
    }

    /// Events after `after`, and every later one. The stream ends when the connection does; go on with
    /// the sequence of the last one.
    pub async fn events(
        &self,
        after: u64,
    ) -> Result<BoxStream<'static, Result<EventView, ClientError>>, ClientError> {
        let path = format!("/api/v1/events?after={after}");
        let open = self.send(
            Method::GET,
            &path,
            None,
            Some(("accept", "text/event-stream")),
        );
        let response = tokio::time::timeout(self.timeout, open)
            .await
            .map_err(|_| ClientError::Broken("no answer in time".to_owned()))??;
        let lines = Lines {
            body: response.into_body().into_data_stream().boxed(),
            buffer: Vec::new(),
        };
        let events = futures_util::stream::unfold(lines, |mut lines| async move {
            loop {
                let line = match lines.next().await? {
                    Ok(line) => line,
                    Err(error) => return Some((Err(error), lines)),
                };
                // `gap` events carry a plain number, which is no event.
                let Some(data) = line.strip_prefix("data:") else {
                    continue;
                };
                if let Ok(event) = serde_json::from_str(data.trim_start()) {
                    return Some((Ok(event), lines));
                }
            }
        });
        Ok(events.boxed())
    }

    /// A body as it comes.
    pub async fn stream(
        &self,
        path: &str,
    ) -> Result<BoxStream<'static, Result<Bytes, ClientError>>, ClientError> {
        let response = self.send(Method::GET, path, None, None).await?;
        let body = response.into_body().into_data_stream();
        let body = body.map(|chunk| chunk.map_err(|error| ClientError::Broken(error.to_string())));
        Ok(body.boxed())
    }

    /// Connects to a VM's serial console.
    pub async fn console(
        &self,
        vm: &str,
    ) -> Result<TokioIo<hyper::upgrade::Upgraded>, ClientError> {
        let path = format!("/api/v1/vms/{vm}/console");
        let response = self
            .send(
                Method::GET,
                &path,
                None,
                Some(("upgrade", CONSOLE_PROTOCOL)),
            )
            .await?;
        let upgraded = hyper::upgrade::on(response).await;
        let upgraded = upgraded.map_err(|error| ClientError::Broken(error.to_string()))?;
        Ok(TokioIo::new(upgraded))
    }
}

async fn collect(response: Response<Incoming>) -> Result<Bytes, ClientError> {
    let body = Limited::new(response.into_body(), MAX_ANSWER)
        .collect()
        .await;
    let body = body.map_err(|error| ClientError::Broken(error.to_string()))?;
    Ok(body.to_bytes())
}

fn refused(status: StatusCode, body: &[u8]) -> ApiError {
    serde_json::from_slice(body).unwrap_or_else(|_| {
        let text = String::from_utf8_lossy(body);
        ApiError::new(ErrorCode::Internal, format!("{status}: {text}"))
    })
}

/// Splits a body into lines.
struct Lines {
    body: BoxStream<'static, Result<Bytes, hyper::Error>>,
    buffer: Vec<u8>,
}

impl Lines {
    async fn next(&mut self) -> Option<Result<String, ClientError>> {
        loop {
            if let Some(end) = self.buffer.iter().position(|byte| *byte == b'\n') {
                let line: Vec<u8> = self.buffer.drain(..=end).collect();
                return Some(Ok(String::from_utf8_lossy(&line).trim_end().to_owned()));
            }
            if self.buffer.len() > MAX_LINE {
                return Some(Err(ClientError::Broken("a line is too long".to_owned())));
            }
            match self.body.next().await? {
                Ok(chunk) => self.buffer.extend_from_slice(&chunk),
                Err(error) => return Some(Err(ClientError::Broken(error.to_string()))),
            }
        }
    }
}
