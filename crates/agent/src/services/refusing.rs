//! The datapath of a host that has none: everything is refused, with the reason.

use quorate_balancer::{
    Applied, BalancerError, Counters, Datapath, EdgeSpec, Flow, Pin, ServiceTable, TraceAnswer,
    TraceQuery, Wanted,
};

/// Refuses everything that would serve; what takes away succeeds, because nothing is there. A host whose kernel cannot
/// run the datapath runs VMs all the same.
#[derive(Debug, Clone)]
pub struct RefusingDatapath {
    reason: String,
}

impl RefusingDatapath {
    /// Why there is none.
    #[must_use]
    pub fn new(reason: impl Into<String>) -> Self {
        Self {
            reason: reason.into(),
        }
    }

    fn refuse<T>(&self) -> Result<T, BalancerError> {
        Err(BalancerError::Unsupported {
            reason: self.reason.clone(),
        })
    }
}

#[async_trait::async_trait]
impl Datapath for RefusingDatapath {
    async fn apply(&self, wanted: &Wanted) -> Result<Applied, BalancerError> {
        match wanted.services.is_empty() {
            true => Ok(Applied::default()),
            false => self.refuse(),
        }
    }
    fn lease(&self, _: u64) {}
    async fn attach_edge(&self, _: &EdgeSpec) -> Result<(), BalancerError> {
        self.refuse()
    }
    async fn open_edge(&self, _: &str) -> Result<(), BalancerError> {
        self.refuse()
    }
    async fn close_edge(&self, _: &str, _: bool) -> Result<(), BalancerError> {
        Ok(())
    }
    async fn detach_edge(&self, _: &str) -> Result<(), BalancerError> {
        Ok(())
    }
    async fn flows(&self, _: &str) -> Result<Vec<Flow>, BalancerError> {
        self.refuse()
    }
    async fn put_flows(&self, _: &str, _: &[Flow]) -> Result<(), BalancerError> {
        self.refuse()
    }
    async fn strays(&self, _: &ServiceTable) -> Result<Vec<Pin>, BalancerError> {
        self.refuse()
    }
    async fn pin(&self, _: &[Pin]) -> Result<(), BalancerError> {
        self.refuse()
    }
    async fn counters(&self) -> Result<Counters, BalancerError> {
        self.refuse()
    }
    async fn trace(&self, _: &TraceQuery) -> Result<TraceAnswer, BalancerError> {
        self.refuse()
    }
}
