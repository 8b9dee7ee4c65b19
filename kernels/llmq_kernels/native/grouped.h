/* Products of tokens with the experts that each picks, all in one parallel region. Included for each NUMBER, after
   few.h. */

/* One expert's outputs of one of its matrices, of as many of its tokens as are multiplied at a time. */
typedef struct { Job job; Weight weight; } NAME(Task);
typedef struct { NAME(Task) *tasks; int64_t count; } NAME(Tasks);

/* What is left of each task in turn: threads meet at the end only. */
static void NAME(tasks)(void *argument)
{
    NAME(Tasks) *all = argument;
    for (NAME(Task) *task = all->tasks; task < all->tasks + all->count; task++) {
        Job *job = &task->job;
        if (__atomic_load_n(&job->next, __ATOMIC_RELAXED) >= job->end)
            continue;
#ifdef WIDE
        if (job->m <= FEW_TOKENS && in_steps(&task->weight)) {
            NAME(few)(job);
            continue;
        }
#endif
        NAME(rows)(job);
    }
}

/* Matrix `number` of those that lie behind `first`. */
static Weight NAME(matrix)(const Weight *first, int64_t number)
{
    const int64_t entries = number * first->n * groups_of(first);
    Weight found = *first;
    found.codes += number * first->n * first->stride;
    found.scales = (const char *)first->scales + entries * (first->scale_type == FLOAT32 ? 4 : 2);
    if (first->zero_type != NONE)
        found.zeros = (const char *)first->zeros + entries * (first->zero_type == UINT8 ? 1 : 2);
    return found;
}

/* The rows by expert: `rows` [count], of which those of expert e end at ends[e]; rows without an expert get zeros. */
static void NAME(sort)(const int64_t *picked, int64_t count, int64_t experts, int64_t *rows, int64_t *ends, NUMBER *y,
                       int64_t pitch)
{
    for (int64_t r = 0; r < count; r++)
        if (picked[r] >= 0 && picked[r] + 1 < experts)
            ends[picked[r] + 1]++;  /* so that after the sums below it is where those of the next begin */
    for (int64_t e = 1; e < experts; e++)
        ends[e] += ends[e - 1];
    for (int64_t r = 0; r < count; r++)
        if (picked[r] >= 0 && picked[r] < experts)
            rows[ends[picked[r]]++] = r;
        else
            memset(y + r * pitch, 0, pitch * sizeof(NUMBER));
}

/* x [.., k], `x_stride` numbers from one token to the next, each of which has `slots` neighbouring rows of y
   [count, parts, n]; picked [count], bias [experts, parts, n] or NULL. `first` is the first of experts * parts matrices
   that lie one behind the other. */
int NAME(llmq_grouped)(const Weight *first, int64_t experts, int64_t parts, const NUMBER *x, int64_t x_stride,
                       int64_t slots, const int64_t *picked, int64_t count, const float *bias, NUMBER *y,
                       Parallel *parallel, int64_t threads)
{
    const int64_t width = up(first->k, STEP), n = first->n, pitch = parts * n;
    int64_t *ends = calloc(experts, sizeof(int64_t)), *rows = malloc(count * sizeof(int64_t));
    NUMBER *panels = aligned_alloc(64, up(count * width * sizeof(NUMBER), 64));
    NAME(Tasks) all = {NULL, 0};
    int64_t outputs = 0, most = 0;
    int failed = !ends || !rows || !panels;
    if (!failed) {
        NAME(sort)(picked, count, experts, rows, ends, y, pitch);
        for (int64_t e = 0, begin = 0; e < experts; begin = ends[e++])
            if (ends[e] > begin)
                most += parts * (1 + (ends[e] - begin) / NAME(span)(ends[e] - begin, width));
        all.tasks = malloc(most * sizeof *all.tasks);
        failed = most && !all.tasks;
    }
    for (int64_t e = 0, begin = 0; !failed && e < experts; begin = ends[e++])
        for (int64_t at = begin, m; at < ends[e]; at += m) {
            m = least(NAME(span)(ends[e] - begin, width), ends[e] - at);
            NAME(fill_panels)(x, x_stride, rows + at, slots, m, first->k, width, panels + at * width);
            for (int64_t p = 0; p < parts; p++, outputs += n) {
                NAME(Task) *task = &all.tasks[all.count++];
                const float *added = bias ? bias + (e * parts + p) * n : NULL;
                task->weight = NAME(matrix)(first, e * parts + p);
                const Job job = {&task->weight, panels + at * width, added, y + p * n, m, width, 0, n, 0, rows + at, pitch};
                task->job = job;
            }
        }
    threads = least(threads, (outputs + SHARE - 1) / SHARE);
    if (all.count && threads > 1)
        parallel(NAME(tasks), &all, (unsigned)threads, 0);
    else if (all.count)
        NAME(tasks)(&all);
    for (int64_t i = 0; i < all.count; i++)
        failed |= all.tasks[i].job.failed;
    free(all.tasks);
    free(panels);
    free(rows);
    free(ends);
    return failed ? NO_MEMORY : DONE;
}
