//! Products of up to 128 rows on Hopper, by clusters of blocks: `cluster_gemm.cu`.

use std::collections::HashMap;
use std::sync::Arc;

use cudarc::driver::sys;

use super::driver::{Context, DevicePtr};
use super::launch::{Argument, Launch, Queue, args};
use super::matmul::{Task, out_type};
use super::module::{Function, Module};
use super::tensor_map::{Boxes, TensorMaps};
use super::{CudaLinear, DeviceFacts};
use crate::{BackendError, DType};

/// Elements of a row in one bulk copy, 128 bytes.
const BOX_COLUMNS: usize = 64;
const BOX_ROW_BYTES: usize = 128;
/// Most weight rows of a warpgroup.
const GROUP_ROWS: usize = 64;
/// Most stages of a ring.
const MOST_STAGES: usize = 12;
/// Most bytes of a block's shared memory, so that two have room on a multiprocessor beside what the driver keeps.
const BLOCK_BYTES: usize = (227 << 9) - 1536;
/// The same of 128 rows of `x`, which take as much room as the weights or more: a block has a multiprocessor for itself, else too few
/// weights are on their way.
const LONE_BLOCK_BYTES: usize = 198 << 10;
/// Outputs for each multiprocessor from which on blocks need not share K.
const WHOLE_ROWS: usize = 40;

/// How a product is shared out.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ClusterPlan {
    /// Rows of `x` it is compiled for.
    pub tokens: usize,
    /// Warpgroups of a block.
    pub groups: usize,
    /// Weight rows of a warpgroup, a multiple of 8.
    pub group_rows: usize,
    /// Blocks of a cluster, which share K.
    pub split: usize,
    /// Stages of the ring.
    stages: usize,
    early: i32,
}

/// `ClusterGemm` of cluster_gemm.cu.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
struct Parameters {
    out: DevicePtr,
    bias: DevicePtr,
    rows: i32,
    inputs: i32,
    out_type: i32,
    activation: i32,
    outputs: i32,
    group_rows: i32,
    split: i32,
    stages: i32,
    early: i32,
}

impl Argument for Parameters {}

/// Rows of `x` of the instantiations, and stages before its last at which a block lets the next kernel start.
const TOKENS: [(usize, i32); 4] = [(16, 8), (32, 4), (64, 1), (128, 4)];
/// Most rows of `x` of gated products, whose blocks have a warpgroup for gates and one for ups.
const MOST_GATED: usize = 64;

/// A kernel for bf16 and for f16, by rows of `x`.
type Kernels = HashMap<usize, [Function; 2]>;

impl ClusterPlan {
    fn stage_bytes(self) -> usize {
        (self.groups * self.group_rows + self.tokens) * BOX_ROW_BYTES
    }

    /// The ring begins at a multiple of 1024, and products of fewer than 64 rows read past its end.
    fn beside_ring(self) -> usize {
        1024 + GROUP_ROWS.saturating_sub(self.group_rows + self.tokens) * BOX_ROW_BYTES
    }

    fn shared_bytes(self) -> usize {
        // Sums of all warpgroups take the place of the ring.
        let sums = self.tokens * self.groups * 128 * 2;
        (self.stages * self.stage_bytes()).max(sums) + self.beside_ring()
    }

    /// For `rows` rows of `x`; `outputs` of the result.
    fn of(rows: usize, outputs: usize, is_gated: bool, num_sms: usize) -> Option<Self> {
        let most = if is_gated { MOST_GATED } else { usize::MAX };
        let (tokens, early) = TOKENS.into_iter().find(|&(tokens, _)| tokens >= rows && tokens <= most)?;
        let groups = if is_gated { 2 } else { 1 };
        let split = if is_gated || outputs >= num_sms * WHOLE_ROWS { 1 } else { 2 };
        // Rows of weights for which all multiprocessors have a block; small tiles are the quicker ones only where most would be idle.
        let rows_of_each = (outputs * split).div_ceil(num_sms);
        let group_rows = if rows_of_each > GROUP_ROWS / 2 { GROUP_ROWS } else { GROUP_ROWS / 2 };
        let mut plan = Self { tokens, groups, group_rows, split, stages: 0, early };
        plan.stages = ((most_bytes(tokens) - plan.beside_ring()) / plan.stage_bytes()).min(MOST_STAGES);
        Some(plan)
    }
}

/// Bytes of shared memory of a block for that many rows of `x`, at most.
fn most_bytes(tokens: usize) -> usize {
    if tokens == 128 { LONE_BLOCK_BYTES } else { BLOCK_BYTES }
}

/// The kernels.
pub(super) struct ClusterGemms {
    plain: Kernels,
    gated: Kernels,
    num_sms: usize,
    maps: TensorMaps,
}

impl ClusterGemms {
    /// Loads them; none where the GPU is no Hopper or the program has no kernels for it.
    pub(super) fn load(context: &Arc<Context>, facts: DeviceFacts) -> Result<Option<Self>, BackendError> {
        if facts.capability != (9, 0) || !kernels::architectures().contains(&"sm_90a") {
            return Ok(None);
        }
        let module = Module::load(context, "cluster_gemm")?;
        let load = |name: &str, groups: usize, most: usize| {
            let find = |tokens: usize, dtype: &str| -> Result<Function, BackendError> {
                let function = module.function(&format!("{name}_{tokens}_{groups}_{dtype}"))?;
                function.allow_shared_memory(most_bytes(tokens) as u32)?;
                Ok(function)
            };
            let both = |tokens: usize| Ok((tokens, [find(tokens, "bf16")?, find(tokens, "f16")?]));
            let tokens = TOKENS.into_iter().map(|(tokens, _)| tokens).filter(|&tokens| tokens <= most);
            tokens.map(both).collect::<Result<Kernels, BackendError>>()
        };
        let (plain, gated) = (load("cluster", 1, usize::MAX)?, load("cluster_gated", 2, MOST_GATED)?);
        Ok(Some(Self { plain, gated, num_sms: facts.num_sms, maps: TensorMaps::default() }))
    }

    /// How a product is computed so: 16-bit elements in rows that bulk copies can take; none: it is for others.
    pub(super) fn plan(&self, task: Task<'_>, is_gated: bool) -> Option<ClusterPlan> {
        let weight = task.weight;
        let outputs = if is_gated { weight.out_features / 2 } else { weight.out_features };
        let fits = weight.dtype != DType::F32
            && (task.out_dtype == DType::F32 || task.out_dtype == weight.dtype)
            && weight.in_features.is_multiple_of(8)
            && task.rows > 0;
        if !fits {
            return None;
        }
        ClusterPlan::of(task.rows, outputs, is_gated, self.num_sms)
    }

    /// Whether a product of `outputs` has a block for nearly every multiprocessor, and no more.
    pub(super) fn is_at_once(&self, plan: ClusterPlan, outputs: usize) -> bool {
        let blocks = outputs.div_ceil(plan.groups * plan.group_rows) * plan.split;
        (self.num_sms * 7 / 8..=self.num_sms).contains(&blocks)
    }

    /// `out = x weight^T (+ bias)`; with an activation `activation(gate) * up` of the product's halves.
    pub(super) fn multiply(
        &mut self,
        queue: &Queue,
        plan: ClusterPlan,
        task: Task<'_>,
        activation: Option<i32>,
    ) -> Result<(), BackendError> {
        let kernels = if activation.is_some() { &self.gated } else { &self.plain };
        let Some(functions) = kernels.get(&plan.tokens) else {
            return Err(BackendError::Device {
                operation: "a product by clusters".to_owned(),
                reason: format!("{plan:?} was not compiled"),
            });
        };
        let function = functions[usize::from(task.weight.dtype != DType::BF16)];
        let halves = if activation.is_some() { 2 } else { 1 };
        let outputs = task.weight.out_features / halves;
        let tiles = outputs.div_ceil(plan.groups / halves * plan.group_rows);
        let launch = Launch {
            function,
            grid: [(tiles * plan.split) as u32, 1, 1],
            block: (plan.groups * 128 + 32) as u32,
            shared_bytes: plan.shared_bytes() as u32,
        };
        let (weights, x) = self.maps_of(plan, task)?;
        let parameters = Parameters {
            out: task.out,
            bias: task.bias,
            rows: task.rows as i32,
            inputs: task.weight.in_features as i32,
            out_type: out_type(task.out_dtype),
            activation: activation.unwrap_or(0),
            outputs: outputs as i32,
            group_rows: plan.group_rows as i32,
            split: plan.split as i32,
            stages: plan.stages as i32,
            early: plan.early,
        };
        queue.launch_clusters(&launch, plan.split as u32, args![weights, x, parameters])
    }

    /// The descriptions of weights and activations.
    fn maps_of(
        &mut self,
        plan: ClusterPlan,
        task: Task<'_>,
    ) -> Result<(sys::CUtensorMap, sys::CUtensorMap), BackendError> {
        let CudaLinear { dtype, out_features, in_features, row_stride, .. } = *task.weight;
        let weights = self.maps.of(Boxes {
            address: task.weight.ptr(),
            dtype,
            rows: out_features,
            columns: in_features,
            row_bytes: row_stride * 2,
            box_size: [plan.group_rows, BOX_COLUMNS],
        })?;
        let x = self.maps.of(Boxes {
            address: task.x,
            dtype,
            rows: task.rows,
            columns: in_features,
            row_bytes: in_features * 2,
            box_size: [plan.tokens, BOX_COLUMNS],
        })?;
        Ok((weights, x))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn plans() -> impl Iterator<Item = ClusterPlan> {
        let outputs = [8, 1000, 2048, 3072, 4096, 6144, 14_336, 128_256];
        let shapes = outputs.into_iter().flat_map(|outputs| [(outputs, false), (outputs, true)]);
        shapes.flat_map(|(outputs, is_gated)| {
            [1, 16, 17, 33, 64, 128]
                .into_iter()
                .filter_map(move |rows| ClusterPlan::of(rows, outputs, is_gated, 132))
        })
    }

    #[test]
    fn two_blocks_of_few_rows_have_room_on_a_multiprocessor() {
        for plan in plans() {
            // 228 KiB, of which the driver keeps one for each block; barriers take less than 512 bytes.
            let blocks = if plan.tokens == 128 { 1 } else { 2 };
            assert!(blocks * (plan.shared_bytes() + 512 + 1024) <= 228 << 10, "{plan:?}");
            assert!((4..=MOST_STAGES).contains(&plan.stages), "{plan:?}");
        }
    }

    #[test]
    fn boxes_keep_the_exchange_of_chunks() {
        for plan in plans() {
            assert!(plan.group_rows.is_multiple_of(8) && plan.group_rows <= GROUP_ROWS, "{plan:?}");
            // Each block of a cluster finishes some columns of eight rows of `x`.
            assert!((plan.tokens / 8).is_multiple_of(plan.split), "{plan:?}");
        }
        assert_eq!(ClusterPlan::of(65, 4096, true, 132), None);
        assert_eq!(ClusterPlan::of(129, 4096, false, 132), None);
    }
}
