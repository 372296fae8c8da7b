// Command interop does what a user of the stock Go client does, one scenario after another, a few at a time.
//
// Arguments: name server, a word that makes topics and groups unique, and the scenarios (all if none is named). It prints
// one JSON line for each and exits with 1 when one failed.
package main

import (
	"context"
	"encoding/json"
	"fmt"
	"os"
	"sort"
	"strings"
	"sync"
	"time"

	rocketmq "github.com/apache/rocketmq-client-go/v2"
	"github.com/apache/rocketmq-client-go/v2/admin"
	"github.com/apache/rocketmq-client-go/v2/consumer"
	"github.com/apache/rocketmq-client-go/v2/primitive"
	"github.com/apache/rocketmq-client-go/v2/producer"
	"github.com/apache/rocketmq-client-go/v2/rlog"
)

const patience = 60 * time.Second

type suite struct {
	namesrv string
	suffix  string
}

type scenario struct {
	name string
	run  func() (string, error)
}

type line struct {
	Scenario string `json:"scenario"`
	OK       bool   `json:"ok"`
	Ms       int64  `json:"ms"`
	Detail   string `json:"detail"`
}

func main() {
	rlog.SetLogLevel("fatal")
	s := &suite{namesrv: os.Args[1], suffix: os.Args[2]}
	// The slow one first, so that the others fill its waiting time.
	all := []scenario{
		{"retry_dlq", s.retryThenDeadLetter},
		{"sync", s.sync},
		{"async", s.async},
		{"oneway", s.oneway},
		{"batch", s.batch},
		{"ordered", s.ordered},
		{"tag", s.tagFilter},
		{"pull", s.pullFrom},
	}
	wanted := map[string]bool{}
	for _, name := range os.Args[3:] {
		wanted[name] = true
	}
	slots := make(chan struct{}, 4)
	var group sync.WaitGroup
	var printing sync.Mutex
	failed := false
	for _, one := range all {
		if len(wanted) > 0 && !wanted[one.name] {
			continue
		}
		slots <- struct{}{}
		group.Add(1)
		go func(one scenario) {
			defer group.Done()
			defer func() { <-slots }()
			begin := time.Now()
			detail, err := one.run()
			result := line{one.name, err == nil, time.Since(begin).Milliseconds(), detail}
			if err != nil {
				result.Detail = err.Error()
			}
			text, _ := json.Marshal(result)
			printing.Lock()
			defer printing.Unlock()
			failed = failed || err != nil
			fmt.Println(string(text))
		}(one)
	}
	group.Wait()
	if failed {
		os.Exit(1)
	}
}

// Scenarios.

func (s *suite) sync() (string, error) {
	topic := s.topic("sync")
	p, err := s.producer("sync")
	if err != nil {
		return "", err
	}
	defer p.Shutdown()
	var sent []string
	for i := 0; i < 20; i++ {
		body := fmt.Sprintf("sync-%d", i)
		message := primitive.NewMessage(topic, []byte(body)).WithKeys([]string{"k" + body})
		message.WithProperty("colour", "blue é")
		if err := send(p, message); err != nil {
			return "", err
		}
		sent = append(sent, body)
	}
	box, c, err := s.consume("sync", topic, consumer.MessageSelector{})
	if err != nil {
		return "", err
	}
	defer c.Shutdown()
	if err := box.await(sent); err != nil {
		return "", err
	}
	for _, message := range box.all() {
		if message.GetProperty("colour") != "blue é" || message.GetKeys() != "k"+string(message.Body) {
			return "", fmt.Errorf("properties %v", message.GetProperties())
		}
	}
	return "20 sent and consumed", nil
}

func (s *suite) async() (string, error) {
	topic := s.topic("async")
	p, err := s.producer("async")
	if err != nil {
		return "", err
	}
	defer p.Shutdown()
	if err := send(p, primitive.NewMessage(topic, []byte("first"))); err != nil {
		return "", err
	}
	var sent []string
	failures := make(chan error, 100)
	for i := 0; i < 100; i++ {
		body := fmt.Sprintf("async-%d", i)
		sent = append(sent, body)
		answered := func(_ context.Context, result *primitive.SendResult, err error) {
			if err == nil && result.Status != primitive.SendOK {
				err = fmt.Errorf("status %v", result.Status)
			}
			failures <- err
		}
		if err := p.SendAsync(context.Background(), answered, primitive.NewMessage(topic, []byte(body))); err != nil {
			return "", err
		}
	}
	for range sent {
		select {
		case err := <-failures:
			if err != nil {
				return "", err
			}
		case <-time.After(patience):
			return "", fmt.Errorf("a callback is missing")
		}
	}
	box, c, err := s.consume("async", topic, consumer.MessageSelector{})
	if err != nil {
		return "", err
	}
	defer c.Shutdown()
	return "100 callbacks, all consumed", box.await(sent)
}

func (s *suite) oneway() (string, error) {
	topic := s.topic("oneway")
	p, err := s.producer("oneway")
	if err != nil {
		return "", err
	}
	defer p.Shutdown()
	if err := send(p, primitive.NewMessage(topic, []byte("first"))); err != nil {
		return "", err
	}
	box, c, err := s.consume("oneway", topic, consumer.MessageSelector{})
	if err != nil {
		return "", err
	}
	defer c.Shutdown()
	var sent []string
	for i := 0; i < 20; i++ {
		body := fmt.Sprintf("oneway-%d", i)
		if err := p.SendOneWay(context.Background(), primitive.NewMessage(topic, []byte(body))); err != nil {
			return "", err
		}
		sent = append(sent, body)
	}
	return "20 arrived", box.await(sent)
}

func (s *suite) batch() (string, error) {
	topic := s.topic("batch")
	p, err := s.producer("batch")
	if err != nil {
		return "", err
	}
	defer p.Shutdown()
	if err := send(p, primitive.NewMessage(topic, []byte("first"))); err != nil {
		return "", err
	}
	var sent []string
	var messages []*primitive.Message
	for i := 0; i < 32; i++ {
		body := fmt.Sprintf("batch-%02d", i)
		messages = append(messages, primitive.NewMessage(topic, []byte(body)).WithTag("t").WithKeys([]string{body}))
		sent = append(sent, body)
	}
	if err := send(p, messages...); err != nil {
		return "", err
	}
	box, c, err := s.consume("batch", topic, consumer.MessageSelector{})
	if err != nil {
		return "", err
	}
	defer c.Shutdown()
	if err := box.await(sent); err != nil {
		return "", err
	}
	offsets := map[string]int64{}
	for _, message := range box.all() {
		offsets[string(message.Body)] = message.QueueOffset
	}
	for i := 1; i < 32; i++ {
		if offsets[sent[i]] != offsets[sent[i-1]]+1 {
			return "", fmt.Errorf("queue offsets of a batch: %v", offsets)
		}
	}
	return "32 in one request, offsets in order", nil
}

func (s *suite) ordered() (string, error) {
	topic := s.topic("ordered")
	p, err := s.producer("ordered", producer.WithQueueSelector(producer.NewHashQueueSelector()))
	if err != nil {
		return "", err
	}
	defer p.Shutdown()
	if err := send(p, primitive.NewMessage(topic, []byte("first"))); err != nil {
		return "", err
	}
	var sent []string
	for i := 0; i < 10; i++ {
		for order := 0; order < 5; order++ {
			body := fmt.Sprintf("%d-%d", order, i)
			message := primitive.NewMessage(topic, []byte(body)).WithTag("order")
			if err := send(p, message.WithShardingKey(fmt.Sprintf("order-%d", order))); err != nil {
				return "", err
			}
			sent = append(sent, body)
		}
	}
	box := newInbox()
	refusals := 0
	c, err := s.pushConsumer("ordered", consumer.WithConsumerOrder(true),
		consumer.WithSuspendCurrentQueueTimeMillis(200*time.Millisecond))
	if err != nil {
		return "", err
	}
	selector := consumer.MessageSelector{Type: consumer.TAG, Expression: "order"}
	err = c.Subscribe(topic, selector, func(_ context.Context, messages ...*primitive.MessageExt) (consumer.ConsumeResult, error) {
		box.mutex.Lock()
		refuse := string(messages[0].Body) == "2-5" && refusals < 2
		if string(messages[0].Body) == "2-5" {
			refusals++
		}
		box.mutex.Unlock()
		if refuse {
			return consumer.SuspendCurrentQueueAMoment, nil
		}
		box.add(messages)
		return consumer.ConsumeSuccess, nil
	})
	if err != nil {
		return "", err
	}
	if err := c.Start(); err != nil {
		return "", err
	}
	defer c.Shutdown()
	if err := box.await(sent); err != nil {
		return "", err
	}
	next := map[string]int{}
	for _, message := range box.all() {
		var order string
		var step int
		parts := strings.Split(string(message.Body), "-")
		order = parts[0]
		fmt.Sscan(parts[1], &step)
		if step != next[order] {
			return "", fmt.Errorf("order %s: %d where %d was due", order, step, next[order])
		}
		next[order]++
	}
	if refusals != 3 {
		return "", fmt.Errorf("refused message came %d times", refusals)
	}
	return "5 orders of 10 steps in order, one queue held back twice", nil
}

func (s *suite) tagFilter() (string, error) {
	topic := s.topic("tag")
	p, err := s.producer("tag")
	if err != nil {
		return "", err
	}
	defer p.Shutdown()
	var wanted []string
	tags := []string{"new", "paid", "sent", "Aa", "BB"}
	for i := 0; i < 25; i++ {
		tag := tags[i%len(tags)]
		body := fmt.Sprintf("%s-%d", tag, i)
		if err := send(p, primitive.NewMessage(topic, []byte(body)).WithTag(tag)); err != nil {
			return "", err
		}
		if tag == "new" || tag == "paid" {
			wanted = append(wanted, body)
		}
	}
	box, c, err := s.consume("tag", topic, consumer.MessageSelector{Type: consumer.TAG, Expression: "new || paid"})
	if err != nil {
		return "", err
	}
	defer c.Shutdown()
	if err := box.await(wanted); err != nil {
		return "", err
	}
	time.Sleep(500 * time.Millisecond)
	if len(box.bodies()) != len(wanted) {
		return "", fmt.Errorf("filtered %v", box.bodies())
	}
	return "10 of 25 by two tags", nil
}

func (s *suite) retryThenDeadLetter() (string, error) {
	topic := s.topic("retry")
	p, err := s.producer("retry")
	if err != nil {
		return "", err
	}
	defer p.Shutdown()
	if err := send(p, primitive.NewMessage(topic, []byte("early"))); err != nil {
		return "", err
	}
	a, err := admin.NewAdmin(admin.WithResolver(primitive.NewPassthroughResolver([]string{s.namesrv})))
	if err != nil {
		return "", err
	}
	defer a.Close()
	// The client looks for new routes each 30 s only. A first consumer makes the group, and with it the group's retry topic,
	// so that the one under test finds its route at the start.
	_, founder, err := s.consume("retry", topic, consumer.MessageSelector{})
	if err != nil {
		return "", err
	}
	if err := awaitQueues(a, "%RETRY%"+s.group("retry")); err != nil {
		return "", err
	}
	founder.Shutdown()
	if err := send(p, primitive.NewMessage(topic, []byte("good"))); err != nil {
		return "", err
	}
	if err := send(p, primitive.NewMessage(topic, []byte("bad")).WithTag("poison").WithKeys([]string{"p"})); err != nil {
		return "", err
	}
	box := newInbox()
	var attempts []int32
	c, err := s.pushConsumer("retry", consumer.WithMaxReconsumeTimes(1))
	if err != nil {
		return "", err
	}
	err = c.Subscribe(topic, consumer.MessageSelector{}, func(ctx context.Context, messages ...*primitive.MessageExt) (consumer.ConsumeResult, error) {
		box.add(messages)
		if string(messages[0].Body) != "bad" {
			return consumer.ConsumeSuccess, nil
		}
		box.mutex.Lock()
		attempts = append(attempts, messages[0].ReconsumeTimes)
		box.mutex.Unlock()
		if concurrently, ok := primitive.GetConcurrentlyCtx(ctx); ok {
			concurrently.DelayLevelWhenNextConsume = 1
		}
		return consumer.ConsumeRetryLater, nil
	})
	if err != nil {
		return "", err
	}
	if err := c.Start(); err != nil {
		return "", err
	}
	defer c.Shutdown()
	if err := box.await([]string{"good", "bad"}); err != nil {
		return "", err
	}
	deadTopic := "%DLQ%" + s.group("retry")
	if err := awaitQueues(a, deadTopic); err != nil {
		return "", err
	}
	dead, d, err := s.consume("retry_dead", deadTopic, consumer.MessageSelector{})
	if err != nil {
		return "", err
	}
	defer d.Shutdown()
	if err := dead.await([]string{"bad"}); err != nil {
		return "", err
	}
	box.mutex.Lock()
	defer box.mutex.Unlock()
	if len(attempts) != 2 || attempts[0] != 0 || attempts[1] != 1 {
		return "", fmt.Errorf("reconsume times %v", attempts)
	}
	buried := dead.all()[0]
	if buried.GetTags() != "poison" || buried.GetKeys() != "p" {
		return "", fmt.Errorf("dead letter's properties %v", buried.GetProperties())
	}
	return "one retry, then " + deadTopic, nil
}

func (s *suite) pullFrom() (string, error) {
	topic := s.topic("pull")
	p, err := s.producer("pull", producer.WithQueueSelector(producer.NewHashQueueSelector()))
	if err != nil {
		return "", err
	}
	defer p.Shutdown()
	var offsets []int64
	var queue *primitive.MessageQueue
	for i := 0; i < 40; i++ {
		message := primitive.NewMessage(topic, []byte(fmt.Sprintf("pull-%d", i))).WithShardingKey("one")
		result, err := p.SendSync(context.Background(), message)
		if err != nil {
			return "", err
		}
		queue = result.MessageQueue
		offsets = append(offsets, result.QueueOffset)
	}
	c, err := rocketmq.NewPullConsumer(consumer.WithGroupName(s.group("pull")), consumer.WithInstance("c_pull"),
		consumer.WithNsResolver(primitive.NewPassthroughResolver([]string{s.namesrv})))
	if err != nil {
		return "", err
	}
	if err := c.Subscribe(topic, consumer.MessageSelector{}); err != nil {
		return "", err
	}
	if err := c.Start(); err != nil {
		return "", err
	}
	defer c.Shutdown()
	end := time.Now().Add(patience)
	got := 0
	for got < 40 {
		result, err := c.PullFrom(context.Background(), queue, offsets[got], 32)
		if err == nil && result.Status == primitive.PullFound {
			for _, message := range result.GetMessageExts() {
				if string(message.Body) != fmt.Sprintf("pull-%d", got) || message.QueueOffset != offsets[got] {
					return "", fmt.Errorf("offset %d holds %s", message.QueueOffset, message.Body)
				}
				got++
			}
		} else if time.Now().After(end) {
			return "", fmt.Errorf("pulled %d, %v", got, err)
		} else {
			time.Sleep(100 * time.Millisecond)
		}
	}
	return "40 of one queue by offset", nil
}

// Helpers.

type queueFinder interface {
	FetchPublishMessageQueues(ctx context.Context, topic string) ([]*primitive.MessageQueue, error)
}

// awaitQueues waits until the name server has a route for the topic.
func awaitQueues(a queueFinder, topic string) error {
	end := time.Now().Add(patience)
	for {
		queues, err := a.FetchPublishMessageQueues(context.Background(), topic)
		if err == nil && len(queues) > 0 {
			return nil
		}
		if time.Now().After(end) {
			return fmt.Errorf("no route for %s: %v", topic, err)
		}
		time.Sleep(200 * time.Millisecond)
	}
}

func (s *suite) topic(name string) string { return "Go_" + name + "_" + s.suffix }

func (s *suite) group(name string) string { return "C_go_" + name + "_" + s.suffix }

func send(p rocketmq.Producer, messages ...*primitive.Message) error {
	result, err := p.SendSync(context.Background(), messages...)
	if err == nil && result.Status != primitive.SendOK {
		err = fmt.Errorf("status %v", result.Status)
	}
	return err
}

func (s *suite) producer(name string, options ...producer.Option) (rocketmq.Producer, error) {
	options = append(options,
		producer.WithNsResolver(primitive.NewPassthroughResolver([]string{s.namesrv})),
		producer.WithGroupName("P_go_"+name+"_"+s.suffix),
		producer.WithInstanceName("p_"+name),
		producer.WithRetry(2),
		producer.WithSendMsgTimeout(10*time.Second))
	p, err := rocketmq.NewProducer(options...)
	if err != nil {
		return nil, err
	}
	return p, p.Start()
}

func (s *suite) pushConsumer(name string, options ...consumer.Option) (rocketmq.PushConsumer, error) {
	options = append(options,
		consumer.WithNsResolver(primitive.NewPassthroughResolver([]string{s.namesrv})),
		consumer.WithGroupName(s.group(name)),
		consumer.WithInstance("c_"+name),
		consumer.WithConsumeFromWhere(consumer.ConsumeFromFirstOffset),
		consumer.WithRebalanceLockInterval(2*time.Second))
	return rocketmq.NewPushConsumer(options...)
}

func (s *suite) consume(name, topic string, selector consumer.MessageSelector) (*inbox, rocketmq.PushConsumer, error) {
	box := newInbox()
	c, err := s.pushConsumer(name)
	if err != nil {
		return nil, nil, err
	}
	err = c.Subscribe(topic, selector, func(_ context.Context, messages ...*primitive.MessageExt) (consumer.ConsumeResult, error) {
		box.add(messages)
		return consumer.ConsumeSuccess, nil
	})
	if err != nil {
		return nil, nil, err
	}
	return box, c, c.Start()
}

// inbox holds what a consumer was handed, in the order in which it was handed it.
type inbox struct {
	mutex    sync.Mutex
	messages []*primitive.MessageExt
}

func newInbox() *inbox { return &inbox{} }

func (b *inbox) add(messages []*primitive.MessageExt) {
	b.mutex.Lock()
	defer b.mutex.Unlock()
	b.messages = append(b.messages, messages...)
}

func (b *inbox) all() []*primitive.MessageExt {
	b.mutex.Lock()
	defer b.mutex.Unlock()
	return append([]*primitive.MessageExt(nil), b.messages...)
}

func (b *inbox) bodies() map[string]bool {
	found := map[string]bool{}
	for _, message := range b.all() {
		found[string(message.Body)] = true
	}
	return found
}

func (b *inbox) await(wanted []string) error {
	end := time.Now().Add(patience)
	for {
		found := b.bodies()
		var missing []string
		for _, body := range wanted {
			if !found[body] {
				missing = append(missing, body)
			}
		}
		if len(missing) == 0 {
			return nil
		}
		if time.Now().After(end) {
			sort.Strings(missing)
			return fmt.Errorf("not within %v: %v", patience, missing)
		}
		time.Sleep(20 * time.Millisecond)
	}
}
