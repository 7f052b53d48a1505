//! A small site on 127.0.0.1 for the tests: a CA, hosts with real sockets, a TCP proxy that can be cut, a raw client.
#![allow(clippy::unwrap_used, dead_code, unreachable_pub, missing_docs)]

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, SystemTime};

use bytes::Bytes;
use quorate_transport::{
    Ca, CaOptions, Caller, CertInfo, Credentials, Handler, HostKey, HostPublicKey, Identity,
    Options, PeerAddr, Peers, Request, RpcStatus, Server, ServerOptions, Subject,
};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio::time::{Instant, sleep, timeout};

pub mod raw;

pub const DAY: Duration = Duration::from_secs(24 * 3600);
pub const LONG: Duration = Duration::from_secs(20);
/// What happens at once, on a machine with other work too. What waits for a dead connection takes [`LONG`] and more.
pub const PROMPT: Duration = Duration::from_secs(5);

pub struct Site {
    pub cluster: String,
    pub ca: Ca,
}

impl Site {
    pub fn new(cluster: &str) -> Self {
        let now = SystemTime::now() - DAY * 100;
        Self {
            cluster: cluster.into(),
            ca: Ca::create(cluster, &CaOptions::default(), now).unwrap(),
        }
    }

    pub fn identity(&self, node: u64) -> Identity {
        self.identity_until(node, SystemTime::now(), DAY * 30)
    }

    pub fn expired(&self, node: u64) -> Identity {
        self.identity_until(node, SystemTime::now() - DAY * 40, DAY * 30)
    }

    pub fn identity_until(&self, node: u64, from: SystemTime, host_life: Duration) -> Identity {
        let key = HostKey::generate().unwrap();
        let subject = Subject {
            cluster: self.cluster.clone(),
            node,
            host: format!("h{node}"),
        };
        let public = HostPublicKey::from_csr_pem(&key.csr_pem().unwrap()).unwrap();
        let options = CaOptions {
            host_life,
            ..CaOptions::default()
        };
        let cert = self.ca.issue(&subject, &public, &options, from).unwrap();
        Identity::new(&key, &cert, self.ca.cert_pem()).unwrap()
    }

    pub async fn host(&self, node: u64) -> Host {
        Host::start(
            self.identity(node),
            Options::default(),
            ServerOptions::default(),
        )
        .await
    }
}

/// Counts how many handlers were dropped before they were done.
#[derive(Default)]
pub struct Echo {
    pub calls: AtomicUsize,
    pub dropped: Arc<AtomicUsize>,
}

struct Guard(Arc<AtomicUsize>);
impl Drop for Guard {
    fn drop(&mut self) {
        self.0.fetch_add(1, Ordering::SeqCst);
    }
}

#[async_trait::async_trait]
impl Handler for Echo {
    async fn handle(&self, request: Request) -> Result<Bytes, RpcStatus> {
        self.calls.fetch_add(1, Ordering::SeqCst);
        match request.method.as_str() {
            "echo" => Ok(request.body),
            "who" | "join" => Ok(who(&request).into()),
            "conflict" => Err(RpcStatus::new(409, "the revision has moved: read it again")),
            "panic" => panic!("this handler panics for the test"),
            "hang" => {
                let _guard = Guard(self.dropped.clone());
                std::future::pending::<()>().await;
                Ok(Bytes::new())
            }
            other => Err(RpcStatus::new(404, format!("no method {other}"))),
        }
    }
}

fn who(request: &Request) -> String {
    let from = match &request.from {
        Caller::Peer { node, host } => format!("{node} {host}"),
        Caller::Anonymous => "anonymous".to_owned(),
    };
    match request.via {
        Some(relay) => format!("{from} via {relay}"),
        None => from,
    }
}

pub struct Host {
    pub node: u64,
    pub addr: SocketAddr,
    pub credentials: Arc<Credentials>,
    pub peers: Peers,
    pub handler: Arc<Echo>,
    pub options: ServerOptions,
    pub server: Option<Server>,
}

impl Host {
    pub async fn start(identity: Identity, client: Options, options: ServerOptions) -> Self {
        let credentials = Credentials::new(identity).unwrap();
        let peers = Peers::new(credentials.clone(), client);
        let mut host = Self {
            node: credentials.info().node,
            addr: "127.0.0.1:0".parse().unwrap(),
            credentials,
            peers,
            handler: Arc::new(Echo::default()),
            options,
            server: None,
        };
        host.up().await;
        host
    }

    pub async fn up(&mut self) {
        let server = Server::bind(
            self.addr,
            self.credentials.clone(),
            self.peers.clone(),
            self.handler.clone(),
            self.options.clone(),
        )
        .await
        .unwrap();
        self.addr = server.local_addr();
        self.server = Some(server);
    }

    pub async fn down(&mut self) {
        self.server.take().unwrap().shutdown().await;
    }

    pub fn server(&self) -> &Server {
        self.server.as_ref().unwrap()
    }

    pub fn knows(&self, peers: &[(u64, SocketAddr)]) {
        let book: BTreeMap<_, _> = peers
            .iter()
            .map(|(node, addr)| {
                let host = format!("h{node}");
                (*node, PeerAddr { host, addr: *addr })
            })
            .collect();
        self.peers.set_peers(book);
    }

    pub async fn text(&self, target: u64, method: &str, limit: Duration) -> String {
        let answer = self.peers.call(target, method, "x", limit).await.unwrap();
        String::from_utf8(answer.to_vec()).unwrap()
    }
}

/// Waits until `good` holds; panics with `what` after [`LONG`].
pub async fn eventually(what: &str, mut good: impl FnMut() -> bool) {
    let end = Instant::now() + LONG;
    while !good() {
        assert!(Instant::now() < end, "not in time: {what}");
        sleep(Duration::from_millis(5)).await;
    }
}

/// A TCP proxy. While it is cut it accepts connections and forwards nothing; a connection that was open at a cut, or opened
/// during one, stays dead for ever, as with a lost route and doubled retransmission timers.
pub struct Proxy {
    pub addr: SocketAddr,
    state: watch::Sender<Cut>,
    task: tokio::task::JoinHandle<()>,
}

#[derive(Clone, Copy, PartialEq)]
struct Cut {
    generation: u64,
    cut: bool,
}

impl Proxy {
    pub async fn start(target: SocketAddr) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let addr = listener.local_addr().unwrap();
        let state = watch::Sender::new(Cut {
            generation: 0,
            cut: false,
        });
        let rx = state.subscribe();
        let task = tokio::spawn(async move {
            loop {
                let (stream, _) = listener.accept().await.unwrap();
                tokio::spawn(pass(stream, target, rx.clone()));
            }
        });
        Self { addr, state, task }
    }

    pub fn cut(&self) {
        self.state.send_modify(|s| {
            s.cut = true;
            s.generation += 1;
        });
    }

    pub fn heal(&self) {
        self.state.send_modify(|s| {
            s.cut = false;
            s.generation += 1;
        });
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        self.task.abort();
    }
}

async fn pass(mut client: TcpStream, target: SocketAddr, mut state: watch::Receiver<Cut>) {
    let born = *state.borrow();
    if !born.cut {
        let Ok(mut server) = TcpStream::connect(target).await else {
            return;
        };
        tokio::select! {
            _ = tokio::io::copy_bidirectional(&mut client, &mut server) => return,
            _ = state.wait_for(|s| *s != born) => {}
        }
        // Dead, but not closed: both ends hear nothing any more.
        let _ = timeout(LONG * 3, std::future::pending::<()>()).await;
        drop(server);
    }
    let _ = timeout(LONG * 3, std::future::pending::<()>()).await;
}

pub fn info(identity: &Identity) -> CertInfo {
    identity.info().clone()
}
