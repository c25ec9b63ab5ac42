//! How a mixture of experts (arXiv:1701.06538) chooses its experts.

/// The rule from a token's router logits, one an expert, to the experts it is sent to and their weights.
///
/// In order: logits become scores; the choice is made by `score + correction`, where there is a correction bias, among the
/// experts of the best groups, where there are groups; equal ones go by their index. The weights are the scores of the
/// chosen, without the correction, divided as `normalization` says and multiplied with `scale`.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Routing {
    /// Experts a token is sent to.
    pub num_chosen: usize,
    /// From logits to scores.
    pub scores: RouterScores,
    /// Limits the choice to some groups of neighbouring experts.
    pub groups: Option<ExpertGroups>,
    /// What the weights of the chosen are divided by.
    pub normalization: WeightNormalization,
    /// Factor on the weights, usually 1.
    pub scale: f32,
}

/// From router logits to scores.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum RouterScores {
    /// Softmax over all experts.
    Softmax,
    /// The logistic function of each.
    Sigmoid,
    /// SparseMixer (arXiv:2409.12136) as it is at inference. Experts are chosen one by one, each with the largest logit `m` of
    /// those left; its weight is its softmax among those left whose logit `l` is near: `(m - l) / max(|l|, m) <= 2 * jitter`.
    /// Without groups and correction.
    SparseMixer {
        /// The jitter's radius in training.
        jitter: f32,
    },
}

/// Groups of neighbouring experts, equally large. Outside of the best groups `score + correction` counts as zero.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ExpertGroups {
    /// Groups; divides the number of experts.
    pub count: usize,
    /// Groups a token may choose from.
    pub num_chosen: usize,
    /// What makes a group the best.
    pub rank: GroupRank,
}

/// What groups are compared by.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum GroupRank {
    /// Its largest `score + correction`.
    Largest,
    /// The sum of its two largest.
    LargestTwo,
}

/// What the weights of the chosen experts are divided by.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum WeightNormalization {
    /// Nothing.
    None,
    /// Their sum.
    Sum,
    /// Their p-norm.
    Norm(f32),
}

impl Routing {
    /// What makes the rule impossible with `num_experts` experts.
    pub fn problem(&self, num_experts: usize) -> Option<String> {
        let chosen = self.num_chosen;
        if !(1..=num_experts).contains(&chosen) {
            return Some(format!("{chosen} experts for a token, expected 1 to {num_experts}"));
        }
        let ExpertGroups { count, num_chosen, rank } = self.groups?;
        if count == 0 || !num_experts.is_multiple_of(count) {
            return Some(format!("{count} groups of {num_experts} experts, expected a divisor"));
        }
        let size = num_experts / count;
        if !(1..=count).contains(&num_chosen) || num_chosen * size < chosen {
            return Some(format!(
                "{num_chosen} groups for a token, expected at most {count} and enough for {chosen} experts"
            ));
        }
        (rank == GroupRank::LargestTwo && size < 2).then(|| {
            format!("groups of {size} expert, which are ranked by their best two, expected larger ones")
        })
    }
}
