//! The units of one VM: every operation is done on all of them, at the same time.
//!
//! Always holds: it has succeeded when it has on every unit; what went wrong is told of the worst one. An
//! operation that failed may have succeeded on some units: repeating it, or giving it back, is safe.

use std::fmt;
use std::future::Future;
use std::time::Duration;

use super::error::ReservationError;
use super::key::ReservationKey;
use super::plan::Refusal;
use super::run::{Claim, Reservation};

/// Why a VM does not have its units, by what follows from it. The worst is the greatest.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub enum Trouble {
    /// A device did not do it, or did not answer: nothing is known.
    Failed(String),
    /// It must not be done, as long as somebody else uses a unit.
    Refused(String),
    /// The cluster has moved on: this host's copy of the guest is not the one that counts.
    Superseded(String),
}

impl fmt::Display for Trouble {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Failed(text) | Self::Refused(text) | Self::Superseded(text) => f.write_str(text),
        }
    }
}

impl From<ReservationError> for Trouble {
    fn from(error: ReservationError) -> Self {
        let text = error.to_string();
        match error.refusal() {
            Some(Refusal::Superseded { .. }) => Self::Superseded(text),
            Some(_) => Self::Refused(text),
            None => Self::Failed(text),
        }
    }
}

/// The units.
#[derive(Debug, Clone, Default)]
pub struct Units {
    units: Vec<(String, Reservation)>,
}

impl Units {
    /// None.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// One more; `name` is what messages call it.
    pub fn push(&mut self, name: String, unit: Reservation) {
        self.units.push((name, unit));
    }

    /// Whether there are none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.units.is_empty()
    }

    /// The same units, with no operation longer than `limit`.
    #[must_use]
    pub fn within(&self, limit: Duration) -> Self {
        let units = self.units.iter();
        Self {
            units: units
                .map(|(name, unit)| (name.clone(), unit.within(limit)))
                .collect(),
        }
    }

    /// [`Reservation::own`] on all.
    ///
    /// # Errors
    /// The worst.
    pub async fn own(&self, mine: ReservationKey, claim: &Claim) -> Result<(), Trouble> {
        self.each_named(|name, unit| {
            let strangers = claim.taken.get(name).cloned().unwrap_or_default();
            async move { unit.own(mine, claim, strangers).await.map(drop) }
        })
        .await
    }

    /// [`Reservation::register`] on all.
    ///
    /// # Errors
    /// The worst.
    pub async fn register(&self, mine: ReservationKey) -> Result<(), Trouble> {
        self.each(|unit| async move { unit.register(mine).await.map(drop) })
            .await
    }

    /// [`Reservation::hand_over`] on all.
    ///
    /// # Errors
    /// The worst.
    pub async fn hand_over(
        &self,
        mine: ReservationKey,
        from: Option<ReservationKey>,
    ) -> Result<(), Trouble> {
        self.each(|unit| async move { unit.hand_over(mine, from).await.map(drop) })
            .await
    }

    /// [`Reservation::release`] on all.
    ///
    /// # Errors
    /// The worst.
    pub async fn release(&self, mine: ReservationKey) -> Result<(), Trouble> {
        self.each(|unit| async move { unit.release(mine).await.map(drop) })
            .await
    }

    /// Ends every registration of this host, by whatever key of this cluster: for a host that runs the guest no more
    /// and does not know under which epochs it did.
    ///
    /// # Errors
    /// The worst.
    pub async fn leave(&self, host: u16) -> Result<(), Trouble> {
        self.each(|unit| async move {
            for key in unit.facts().await?.ours(unit.cluster()) {
                if key.host() == host {
                    unit.release(key).await?;
                }
            }
            Ok(())
        })
        .await
    }

    /// Whether that key holds the reservations of all of them, by what the devices say now. Others may be registered
    /// beside it.
    ///
    /// # Errors
    /// When one does not answer.
    pub async fn are_held_by(&self, mine: ReservationKey) -> Result<bool, Trouble> {
        let mut all = true;
        for (_, unit) in &self.units {
            let facts = unit.facts().await?;
            all &= facts.holder(mine.cluster()) == Some(mine);
        }
        Ok(all)
    }

    async fn each<F>(&self, work: impl Fn(Reservation) -> F) -> Result<(), Trouble>
    where
        F: Future<Output = Result<(), ReservationError>>,
    {
        self.each_named(|_, unit| work(unit)).await
    }

    async fn each_named<F>(&self, work: impl Fn(&str, Reservation) -> F) -> Result<(), Trouble>
    where
        F: Future<Output = Result<(), ReservationError>>,
    {
        let all = self.units.iter().map(|(name, unit)| {
            let done = work(name, unit.clone());
            async move { done.await.map_err(|error| name_it(name, error)) }
        });
        let worst = futures_util::future::join_all(all)
            .await
            .into_iter()
            .filter_map(Result::err)
            .max();
        worst.map_or(Ok(()), Err)
    }
}

fn name_it(name: &str, error: ReservationError) -> Trouble {
    let named = |text: String| format!("disk {name}: {text}");
    match Trouble::from(error) {
        Trouble::Failed(text) => Trouble::Failed(named(text)),
        Trouble::Refused(text) => Trouble::Refused(named(text)),
        Trouble::Superseded(text) => Trouble::Superseded(named(text)),
    }
}

#[cfg(test)]
mod tests {
    use super::super::{ClusterTag, Command, FakeLun, Strangers};
    use super::*;
    use std::sync::Arc;

    fn tag() -> ClusterTag {
        ClusterTag::of("c1")
    }

    fn key(host: u64, epoch: u64) -> ReservationKey {
        ReservationKey::new(tag(), host, epoch).unwrap()
    }

    fn claim(spent: u32, past_cut: bool) -> Claim {
        Claim {
            spent,
            past_cut,
            ..Claim::default()
        }
    }

    fn units(luns: &[FakeLun], nexus: u32) -> Units {
        let mut units = Units::new();
        for (index, lun) in luns.iter().enumerate() {
            let device = Arc::new(lun.nexus(nexus));
            let unit = Reservation::new(device, tag(), Duration::from_secs(5));
            units.push(format!("disk{index}"), unit);
        }
        units
    }

    fn writers(luns: &[FakeLun]) -> Vec<Vec<u32>> {
        let may = |lun: &FakeLun| (1..=3).filter(|nexus| lun.may_write(*nexus)).collect();
        luns.iter().map(may).collect()
    }

    #[tokio::test]
    async fn a_migration_hands_all_units_over_and_one_that_failed_gives_them_back() {
        let luns = [FakeLun::new(), FakeLun::new()];
        let (source, target) = (units(&luns, 1), units(&luns, 2));
        source.own(key(1, 4), &claim(4, true)).await.unwrap();
        target.register(key(2, 5)).await.unwrap();
        assert_eq!(writers(&luns), [[1, 2], [1, 2]]);
        target.hand_over(key(2, 5), Some(key(1, 4))).await.unwrap();
        assert_eq!(writers(&luns), [[2], [2]]);
        let pushed = luns.iter().map(|lun| lun.log().len());
        // Again, as a call that arrives twice does; and by one that takes somebody else for the source.
        target.hand_over(key(2, 5), Some(key(1, 4))).await.unwrap();
        target.hand_over(key(2, 5), Some(key(3, 3))).await.unwrap();
        assert!(
            luns.iter()
                .map(|lun| lun.log().len())
                .eq(pushed.collect::<Vec<_>>())
        );
        // Not without knowing that it was given up.
        let error = source.own(key(1, 4), &claim(4, true)).await.unwrap_err();
        assert!(matches!(error, Trouble::Superseded(_)), "{error}");
        source.own(key(1, 4), &claim(5, true)).await.unwrap();
        assert_eq!(writers(&luns), [[1], [1]]);
        assert!(source.are_held_by(key(1, 4)).await.unwrap());
        // A later owner is never pushed out by what was given up before.
        target.own(key(2, 6), &claim(6, true)).await.unwrap();
        let error = source.own(key(1, 4), &claim(5, true)).await.unwrap_err();
        assert!(error.to_string().contains("has taken over"), "{error}");
    }

    #[tokio::test]
    async fn a_cut_keeps_one_host_out_until_it_is_over_or_the_next_owner_comes() {
        let luns = [FakeLun::new()];
        let (owner, other, third) = (units(&luns, 1), units(&luns, 2), units(&luns, 3));
        let unit = &third.units[0].1;
        let cut = ReservationKey::fence(tag(), 4).unwrap();
        owner.own(key(1, 4), &claim(4, true)).await.unwrap();
        unit.cut(cut, 1).await.unwrap();
        assert_eq!(writers(&luns), [[3]]);
        assert!(unit.cut(cut, 1).await.unwrap().commands.is_empty());
        let error = owner.own(key(1, 4), &claim(4, false)).await.unwrap_err();
        assert!(error.to_string().contains("was cut off"), "{error}");
        assert!(
            matches!(error, Trouble::Refused(_)),
            "it may be let in again"
        );
        owner.own(key(1, 4), &claim(4, true)).await.unwrap();
        assert_eq!(writers(&luns), [[1]]);
        // Again, and now somebody else becomes the owner.
        unit.cut(cut, 1).await.unwrap();
        other.own(key(2, 5), &claim(5, false)).await.unwrap();
        assert_eq!(writers(&luns), [[2]]);
        let error = owner.own(key(1, 4), &claim(4, true)).await.unwrap_err();
        assert!(matches!(error, Trouble::Superseded(_)), "{error}");
        // A cut of the old owner that comes late changes nothing for the new one.
        assert!(unit.cut(cut, 1).await.unwrap().commands.is_empty());
        assert_eq!(writers(&luns), [[2]]);
    }

    #[tokio::test]
    async fn under_its_guests_writes_a_host_takes_back_what_nobody_else_has() {
        let busy = |spent| Claim {
            busy: true,
            ..claim(spent, true)
        };
        let aborted = |lun: &FakeLun| -> Vec<bool> {
            let log = lun.log();
            let abort = log.iter().filter_map(|(_, command)| match command {
                Command::Preempt { abort, .. } => Some(*abort),
                _ => None,
            });
            abort.collect()
        };
        let luns = [FakeLun::new()];
        let (owner, other, third) = (units(&luns, 1), units(&luns, 2), units(&luns, 3));
        owner.own(key(1, 4), &busy(4)).await.unwrap();
        let cut = ReservationKey::fence(tag(), 4).unwrap();
        third.units[0].1.cut(cut, 1).await.unwrap();
        assert_eq!(aborted(&luns[0]), [true], "its writes under way");
        // The cut is over: nothing of anybody is under way but its own.
        owner.own(key(1, 4), &busy(4)).await.unwrap();
        assert_eq!(writers(&luns), [[1]]);
        assert_eq!(aborted(&luns[0]), [true, false]);
        // The target of a migration that came to nothing has the unit: not while the guest runs.
        other.register(key(2, 5)).await.unwrap();
        other.hand_over(key(2, 5), None).await.unwrap();
        let error = owner.own(key(1, 4), &busy(5)).await.unwrap_err();
        assert!(matches!(error, Trouble::Refused(_)), "{error}");
        assert!(error.to_string().contains("stand still"), "{error}");
        assert_eq!(writers(&luns), [[2]], "not even registered");
        owner.own(key(1, 4), &claim(5, true)).await.unwrap();
        assert_eq!(writers(&luns), [[1]]);
        assert_eq!(aborted(&luns[0]), [true, false, false, true]);
        // Lost by the unit: made again.
        luns[0].forget();
        owner.own(key(1, 4), &busy(5)).await.unwrap();
        assert_eq!(writers(&luns), [[1]]);
    }

    #[tokio::test]
    async fn a_cut_of_a_migrations_source_leaves_its_target_alone() {
        let luns = [FakeLun::new()];
        let (source, target, third) = (units(&luns, 1), units(&luns, 2), units(&luns, 3));
        source.own(key(1, 4), &claim(4, true)).await.unwrap();
        target.register(key(2, 5)).await.unwrap();
        let cut = ReservationKey::fence(tag(), 4).unwrap();
        third.units[0].1.cut(cut, 1).await.unwrap();
        assert_eq!(writers(&luns), [[2, 3]]);
        target.hand_over(key(2, 5), None).await.unwrap();
        assert_eq!(writers(&luns), [[2]]);
    }

    #[tokio::test]
    async fn a_host_that_never_registered_is_kept_out_by_a_cut_as_well() {
        let luns = [FakeLun::new()];
        let cut = ReservationKey::fence(tag(), 4).unwrap();
        units(&luns, 3).units[0].1.cut(cut, 1).await.unwrap();
        assert_eq!(writers(&luns), [[3]]);
    }

    #[tokio::test]
    async fn the_worst_unit_is_told_and_a_stranger_is_refused() {
        let luns = [FakeLun::new(), FakeLun::new(), FakeLun::new()];
        luns[0].set_down(1, true);
        luns[1].put_key(3, 0xbad);
        let mine = units(&luns, 1);
        let error = mine.own(key(1, 4), &claim(4, true)).await.unwrap_err();
        assert!(matches!(error, Trouble::Refused(_)), "{error}");
        assert!(error.to_string().starts_with("disk disk1"), "{error}");
        units(&luns[2..], 2)
            .own(key(2, 9), &claim(9, true))
            .await
            .unwrap();
        let error = mine.own(key(1, 4), &claim(4, true)).await.unwrap_err();
        assert!(matches!(error, Trouble::Superseded(_)), "{error}");
    }

    #[tokio::test]
    async fn a_unit_is_taken_from_the_strangers_that_were_named_and_no_others() {
        let taken = |keys: &[u64]| Claim {
            taken: [(
                "disk0".to_owned(),
                Strangers::These {
                    keys: keys.iter().copied().collect(),
                    hold: true,
                },
            )]
            .into(),
            ..claim(4, true)
        };
        let luns = [FakeLun::new()];
        luns[0].put_key(3, 0xbad);
        let mine = units(&luns, 1);
        for claim in [claim(4, true), taken(&[]), taken(&[0xbae])] {
            let error = mine.own(key(1, 4), &claim).await.unwrap_err();
            assert!(error.to_string().contains("storage take"), "{error}");
        }
        let busy = Claim {
            busy: true,
            ..taken(&[0xbad])
        };
        let error = mine.own(key(1, 4), &busy).await.unwrap_err();
        assert!(error.to_string().contains("stand still"), "{error}");
        mine.own(key(1, 4), &taken(&[0xbad, 0xbae])).await.unwrap();
        assert_eq!(writers(&luns), [[1]]);
        // Another one that comes later is not meant.
        luns[0].put_key(3, 0xbaf);
        let error = mine.own(key(1, 4), &taken(&[0xbad])).await.unwrap_err();
        assert!(matches!(error, Trouble::Refused(_)), "{error}");
    }

    #[tokio::test]
    async fn a_host_leaves_whatever_its_epochs_were() {
        let luns = [FakeLun::new()];
        let mine = units(&luns, 1);
        mine.own(key(1, 4), &claim(4, true)).await.unwrap();
        units(&luns, 2).register(key(2, 5)).await.unwrap();
        mine.leave(1).await.unwrap();
        assert!(!luns[0].is_reserved());
        mine.leave(1).await.unwrap();
        let seen = mine.units[0].1.inspect().await.unwrap();
        assert_eq!(seen.ours, [key(2, 5)], "another host's stays");
    }
}
