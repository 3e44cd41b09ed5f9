//! Secure aggregation in numbers and words.

use super::{Dropouts, RoundReport, SecureReport, words};

impl SecureReport {
    /// Adds up the rounds.
    pub(crate) fn of(rounds: &[RoundReport]) -> Self {
        let mut report = Self::default();
        for round in rounds {
            let advertised: u32 = round.cohorts.iter().map(|cohort| cohort.members).sum();
            report.dropouts.advertise += round.selected.saturating_sub(advertised);
            for cohort in &round.cohorts {
                report.opened += u32::from(cohort.survivors.is_some());
                report.failed += u32::from(cohort.survivors.is_none());
                if cohort.members > report.cohort {
                    (report.cohort, report.k, report.t) = (cohort.members, cohort.degree, cohort.threshold);
                }
                let [share, mask, confirm, reveal] = cohort.dropouts;
                let sum = &mut report.dropouts;
                sum.share += share;
                sum.mask += mask;
                sum.confirm += confirm;
                sum.reveal += reveal;
            }
        }
        report
    }

    /// One sentence for people.
    pub(crate) fn in_words(&self) -> String {
        let Dropouts { advertise, share, mask, confirm, reveal } = self.dropouts;
        let failed = if self.failed > 0 { format!(", {} failed", self.failed) } else { String::new() };
        format!(
            "{} opened{failed}; at most {} members, {} neighbours, threshold {}; devices lost before step 0 to 4: \
             {advertise}, {share}, {mask}, {confirm}, {reveal}",
            words::plural(u64::from(self.opened), "cohort"),
            self.cohort,
            self.k,
            self.t,
        )
    }
}
