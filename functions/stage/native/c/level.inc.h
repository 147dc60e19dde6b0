/* The source of every level. It needs INLINE, UNROLL, `vec` with its functions, BLOCK_ROWS, and LEVEL, the name of the
   table. */

#include "level.h"

enum { LANES = 16 };

#include "row.inc.h"
#include "router.inc.h"
#include "matrix.inc.h"
#ifdef WITH_TILES
#include "amx.inc.h"
#endif
#include "q4.inc.h"
#include "blocks.inc.h"
#include "float_blocks.inc.h"
#include "multiply.inc.h"
#include "adapters.inc.h"
#include "attention.inc.h"
#include "recurrent.inc.h"
#include "sampler.inc.h"

const Level LEVEL = {
    .name = LEVEL_NAME,
    .normalize = normalize,
#ifdef WITH_TILES
    .pack = pack_for_tiles,
    .arrange = arrange,
#else
    .pack = pack,
#endif
    .multiply = multiply,
    .multiply_gated = multiply_gated,
    .project = project,
    .add_low_rank = add_low_rank,
    .activate = activate,
    .cut = cut_below,
    .tanh = tanh_of_row,
    .add_scaled = add_scaled,
    .choose = choose_experts,
    .write_kv = write_kv,
    .draw = draw_token,
    .softmax = compute_softmax,
    .attend = attend,
    .convolve = convolve,
    .prepare_row = prepare_row,
    .recur = recur,
    .gate_row = gate_row,
    .merge_pieces = merge_pieces,
};
